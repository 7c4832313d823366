"""Configuration of workers, engine and optimizer."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, added, runtime


class WorkersConfig(Config):
    """The workers of the training jobs and the resources of each. None of it changes what is computed."""

    count: int = runtime(1, ge=1)
    """Training workers (the world size); at most `stream.lanes`."""
    min_count: int | None = runtime(None, ge=1)
    """Train with as few as this while the cluster can't hold all; workers that come back join again. Null insists on
    all of them."""
    resize_seconds: float = runtime(60.0, gt=0)
    """Seconds between two checks whether more workers can join, with `min_count`."""
    use_gpu: bool = runtime(False)
    """Train on one GPU per worker, with NCCL, instead of CPU cores and gloo."""
    cpus: float = runtime(1.0, gt=0)
    """CPU cores that Ray reserves per worker."""
    gpus: float = runtime(1.0, gt=0, le=1)
    """Share of a GPU that Ray reserves per worker, where `use_gpu`: two runs of 0.5 and one worker each share one."""
    threads: int = runtime(1, ge=1)
    """Threads of torch per worker; a fixed number keeps CPU results bitwise identical between runs."""
    tf32: bool | None = runtime(None)
    """Let GPUs round the factors of fp32 matrix products and convolutions to TF32, which is several times faster; null
    does where `use_gpu` and not `deterministic`. Metrics are computed without it."""
    peak_flops: float | None = runtime(None, gt=0)
    """FLOP/s that the device of a worker can do at most, for the utilization in the log; null looks known GPUs up."""
    deterministic: bool = runtime(False)
    """Choose algorithms on GPUs that give the same bits every time; slower."""
    wait_for_nodes: bool = runtime(False)
    """Start although the cluster can't hold all workers yet, because it will grow."""
    dashboard: bool = runtime(False)
    """Serve the Ray Dashboard on loopback, where the job starts Ray itself."""
    max_failures: int = runtime(3, ge=0)
    """Restarts from the last checkpoint after a worker was lost, before the job gives up. Machines that a cloud takes
    away with a notice do not count."""
    hourly_price: float | None = runtime(None, ge=0)
    """Price of a worker for an hour, in any currency: the report tells what the trainings cost."""

    @property
    def rounds_to_tf32(self) -> bool:
        """True where GPUs round the factors of fp32 products to TF32."""
        return self.use_gpu and not self.deterministic if self.tf32 is None else self.tf32

    @model_validator(mode="after")
    def _minimum_below_count(self) -> Self:
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(f"min_count={self.min_count} exceeds count={self.count}: lower it")
        return self

    @model_validator(mode="after")
    def _ranks_have_their_own_gpus(self) -> Self:
        if self.gpus < 1 and self.count > 1:
            raise ValueError(f"gpus={self.gpus:g} with count={self.count}: NCCL wants a whole GPU for each worker")
        return self


Precision = Literal["fp32", "bf16"]
"""Precision of the forward pass; weights, gradients, optimizer and losses are always fp32."""


class EngineConfig(Config):
    """Backend and partitioning by which one set of weights is optimized across the workers."""

    backend: Literal["deepspeed", "torch"] = runtime("deepspeed")
    """`torch` is plain PyTorch with averaged gradients, the reference that DeepSpeed is tested against."""
    zero_stage: Literal[0, 1, 2, 3] = runtime(1)
    """ZeRO stage: partition nothing, the optimizer's state, gradients as well, and the weights as well."""
    persistence_threshold: int | None = runtime(None, ge=0)
    """Weights below which ZeRO stage 3 keeps a tensor in full on every rank; null is DeepSpeed's own choice."""
    bucket_elements: int = runtime(50_000_000, ge=1)
    """Most gradient values that are averaged over the ranks at once, while the backward pass goes on, and most weights
    that ZeRO gathers at once. A larger tensor travels alone."""
    communication_data_type: Precision = added("fp32")
    """Precision in which gradients travel between the ranks; `bf16` halves the bytes and rounds them."""
    max_live_parameters: int | None = runtime(None, ge=0)
    """Gathered weights that ZeRO stage 3 keeps on a rank at most; null is DeepSpeed's own choice."""
    max_reuse_distance: int | None = runtime(None, ge=0)
    """ZeRO stage 3 keeps gathered weights that are used again within so many others; null is DeepSpeed's own choice."""
    offload_optimizer: bool = runtime(False)
    """Keep the optimizer's state in the host's memory and update there; for ZeRO stages 1 to 3."""

    @property
    def has_whole_weights(self) -> bool:
        """True where every rank holds all weights at any time."""
        return self.backend == "torch" or self.zero_stage < 3

    @model_validator(mode="after")
    def _offloads_what_is_divided(self) -> Self:
        if self.offload_optimizer and (self.backend != "deepspeed" or self.zero_stage == 0):
            raise ValueError(
                f"offload_optimizer=true with backend={self.backend} and zero_stage={self.zero_stage}: only "
                "DeepSpeed's stages 1 to 3 can; raise zero_stage or switch it off"
            )
        return self


class MuonConfig(Config):
    """Muon, which orthogonalizes the momentum of weights that are matrices; AdamW updates all other weights.

    Names of weights are matched by patterns, in which `*` stands for anything. A weight with more than two dimensions
    is the matrix of its rows. Those with one are never Muon's.
    """

    matrices: tuple[str, ...] = Field(("*",), min_length=1)
    """Patterns of the matrices that Muon updates."""
    others: tuple[str, ...] = ()
    """Patterns of those that AdamW updates. Every matrix matches a pattern of exactly one of the two lists."""
    learning_rate_factor: float = Field(1.0, gt=0)
    """Learning rate of the matrices in units of AdamW's, which `learning_rate` and the schedule give."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of the matrices; `optimizer.weight_decay` is AdamW's."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Share of the momentum that stays from one step to the next."""
    nesterov: bool = True
    """Look ahead: mix the gradient once more into the momentum that is orthogonalized."""
    iterations: int = Field(5, ge=1)
    """Newton-Schulz iterations."""
    precision: Precision = "bf16"
    """Precision of the iterations; `fp32` is faster on most CPUs and slower on GPUs."""
    scale: Literal["match_rms_adamw", "original", "internal_guidance"] = "match_rms_adamw"
    """Factor of the update of a matrix with r rows and c columns. `match_rms_adamw`: 0.2 √max(r, c), about the root
    mean square of AdamW's updates, whose learning rates it takes over; `original`: √max(1, r / c); `internal_guidance`:
    the product of both, as released with that method."""

    @property
    def fused(self) -> Mapping[str, int]:
        """By pattern, equal matrices that a weight holds one below the other; each is orthogonalized alone."""
        return {}


class OptimizerConfig(Config):
    """Adam with decoupled weight decay; with `weight_decay` 0 it is plain Adam."""

    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(None, gt=0)
    """Global gradient norm above which gradients are scaled down; null switches clipping off."""
    muon: MuonConfig | None = added(None)
    """A section updates matrices by Muon, with plain PyTorch or ZeRO stage 0; null updates everything by AdamW."""

    def check_engine(self, engine: EngineConfig, key: str = "optimizer") -> None:
        """Raise ValueError where an engine can't take the optimizer, which is that of `key`."""
        if self.muon is None or engine.backend == "torch" or engine.zero_stage == 0:
            return
        divides = {1: "the optimizer's state", 2: "gradients", 3: "weights"}[engine.zero_stage]
        what = f"zero_stage={engine.zero_stage}: DeepSpeed flattens and divides {divides}"
        if engine.offload_optimizer:
            what = "offload_optimizer=true: DeepSpeed flattens what it updates in the host's memory"
        raise ValueError(
            f"{key}.muon with engine.{what}, and Muon needs whole matrices; set engine.zero_stage=0 without offload, "
            "or engine.backend=torch"
        )
