"""From class labels and indices of noise to images: guidance and solver, latent statistics, decoder."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.data.pixels import pixel_dtype, to_pixels
from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.diffusion.guidance import guide
from vavae.diffusion.solvers import solve, solve_mean_flow
from vavae.distributed.compilation import compile_each, compiles_blocks
from vavae.distributed.config import Precision
from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.interop.averages import load_lightningdit_of_checkpoint
from vavae.interop.export import load_latent_models, load_lightningdit
from vavae.latents.statistics import LatentNormalizer
from vavae.models.dit.class_token import join_class_token
from vavae.models.dit.model import LightningDiT
from vavae.models.dit.routing import kept_tokens
from vavae.models.tokenizer.representation import Autoencoder
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.runs.run import StoredArtifact, StoredCheckpoint
from vavae.runs.sampling_inputs import SamplingInputs


class Sampler(NamedTuple):
    """The models that turn noise into images."""

    tokenizer: Autoencoder
    lightningdit: LightningDiT
    normalizer: LatentNormalizer
    precision: Precision = "fp32"
    """Precision of the layers of both models; the solver's state and the decoder's output are float32."""
    depth: int = 8
    """Bits of a channel of the images."""
    weak: LightningDiT | None = None
    """Model of `guidance.weak`."""

    @classmethod
    def of(
        cls,
        tokenizer: Autoencoder,
        lightningdit: LightningDiT,
        normalizer: LatentNormalizer,
        config: RunConfig,
        device: torch.device,
        weak: LightningDiT | None = None,
    ) -> "Sampler":
        """Move models to the device where they are to sample, in the precision and compiled as `config.sample` says."""
        transformers = [lightningdit] if weak is None else [lightningdit, weak]
        if compiles_blocks(config.sample.compile_blocks, config.workers, device):
            blocks = [block for each in transformers for block in each.all_blocks]
            compile_each([*blocks, *tokenizer.residual_blocks()])
        models = tokenizer.to(device), lightningdit.to(device), normalizer.to(device)
        return cls(*models, config.sample.precision, config.shards.depth, None if weak is None else weak.to(device))

    @classmethod
    def load(cls, inputs: SamplingInputs, device: torch.device | None = None) -> "Sampler":
        """Load both exported models and the statistics of the latents.

        Args:
            inputs: the exports and the latents.
            device: where to put them; None takes a GPU where there is one.

        Raises:
            UserError: the LightningDiT was trained on another tokenizer's latents, or the weak model can't guide it.
        """
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        autoencoder, model, normalizer = load_latent_models(inputs)
        weak = load_weak_model(inputs.weak, model)
        return cls.of(autoencoder, model, normalizer, inputs.config, device, weak)

    @torch.inference_mode()
    def images(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        seed: int,
        guidance: GuidanceConfig,
        solver: SolverConfig,
    ) -> Tensor:
        """Generate images: uint8 or uint16 [B, C, H, W].

        Args:
            indices: index of each image's noise, which depends on it and the seed alone.
            labels: class of each image.
            seed: seed of the run.
            guidance: all guidance.
            solver: solver of the flow.

        Raises:
            UserError: an image is not finite; it would be black. Or guidance or solver ask for what the model has not.
        """
        model = self.lightningdit
        device = self.normalizer.mean.device
        shape = (model.latent_dim, *model.grid)
        noise = noise_of(indices, shape, seed)  # [B, C, h, w], as the latents
        if model.config.class_token is not None:
            width = model.config.class_token.width
            generators = [torch_generator(seed, "sample class token", index) for index in indices]
            noise = join_class_token(noise, torch.stack([torch.randn(width, generator=each) for each in generators]))
        self._check(guidance, solver)
        keep = None
        if guidance.routing_scale != 1:
            generators = [torch_generator(seed, "sample routing", index) for index in indices]
            keep = partial(_kept_tokens, generators, math.prod(model.tokens), device)
        weak = None if self.weak is None else self.autocast()(self.weak.forward)
        predict, x, y = self.autocast()(model.predict), noise.to(device), torch.tensor(labels, device=device)
        if solver.name == "mean_flow":
            inputs = None
            if model.guidance_embedder is not None:
                inputs = torch.tensor([[guidance.scale, *guidance.interval]], device=device)
            average = partial(predict, guidance=inputs)
            state = solve_mean_flow(lambda x, t, y, r: average(x, t, y, end=r).velocity, x, y, solver)
        else:
            velocity = guide(predict, model.null_label, guidance, weak, keep)
            by_euler = any(each.config.predicts_data for each in (model, self.weak) if each is not None)
            state = solve(velocity, x, y, solver, velocity.jumps, ends_by_euler=by_euler, dimension=math.prod(shape))
        latents = state[:, : model.latent_dim]
        decode = self.autocast()(self.tokenizer.decode)
        decoded = decode(self.normalizer.denormalize(latents))
        finite = decoded.isfinite().all()
        images = to_pixels(decoded, pixel_dtype(self.depth)).cpu()  # the host waits here, and not for the flag
        if not finite:
            self._refuse(latents, decoded.isfinite().flatten(1).all(1), indices)
        return images

    def _check(self, guidance: GuidanceConfig, solver: SolverConfig) -> None:
        """Raise a UserError where guidance or solver ask for a part that the LightningDiT does not have."""
        model, routing = self.lightningdit, self.lightningdit.config.routing
        if guidance.internal_scale != 1 and model.final_layer_xr is None:
            raise UserError(
                f"guidance.internal_scale={guidance.internal_scale:g}, but the LightningDiT has no intermediate head "
                "(lightningdit.intermediate_head): set it to 1"
            )
        if solver.name == "mean_flow" and model.length_embedder is None:
            raise UserError(
                "solver.name=mean_flow takes steps by average velocities, and the LightningDiT was trained without "
                "objective.mean_flow: set euler or heun"
            )
        if guidance.path_drop and (routing is None or routing.fuse is None):
            raise UserError(
                "guidance.path_drop=true, but the LightningDiT has no lightningdit.routing.fuse: set it to false"
            )
        if guidance.routing_scale != 1 and routing is None:
            raise UserError(
                f"guidance.routing_scale={guidance.routing_scale:g}, but the LightningDiT was trained without "
                "lightningdit.routing: set it to 1"
            )

    def _refuse(self, latents: Tensor, finite: Tensor, indices: Sequence[int]) -> None:
        """Raise the UserError that says where values came from that are not finite, in weights or in latents."""
        remedy = "take an earlier checkpoint"
        require_finite(self.lightningdit.state_dict(), "weights of the LightningDiT", remedy)
        require_finite(self.tokenizer.state_dict(), "weights of the tokenizer", remedy)
        require_finite(self.normalizer.state_dict(), "statistics of the latents", "compute the latents again")
        bad = int(finite.logical_not().nonzero()[0])
        if latents[bad].isfinite().all():
            what, cure = "the tokenizer's decoder overflows", "train that tokenizer again"
        else:
            what, cure = "the LightningDiT's latent is not finite", "lower guidance.scale, take more solver.num_steps"
        raise UserError(
            f"sample {indices[bad]}: {what}, though all weights are finite: set sample.precision=fp32, or {cure}"
        )

    def autocast(self) -> torch.autocast:
        """The autocast that both models run under."""
        return torch.autocast(self.normalizer.mean.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def batches(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        seed: int,
        guidance: GuidanceConfig,
        solver: SolverConfig,
        batch_size: int,
    ) -> Iterator[Tensor]:
        """Generate images in batches uint8 [b, 3, H, W], b at most `batch_size`; see :meth:`images`."""
        for start in range(0, len(indices), batch_size):
            batch = slice(start, start + batch_size)
            yield self.images(indices[batch], labels[batch], seed, guidance, solver)


def load_weak_model(stored: StoredArtifact | StoredCheckpoint | None, model: LightningDiT) -> LightningDiT | None:
    """Load the model that is to guide a better one, on the CPU; None stays None.

    Raises:
        UserError: it is for latents of another shape, or for other classes; or a file of its checkpoint is damaged.
    """
    if stored is None:
        return None
    if isinstance(stored, StoredCheckpoint):  # of the training of the model that it is to guide
        return load_lightningdit_of_checkpoint(
            stored.training, stored.images_seen, model.config, model.latent_dim, model.grid
        )
    weak, _ = load_lightningdit(stored.folder)
    for name in ("latent_dim", "grid", "null_label", "state_shape"):
        ours, theirs = getattr(model, name), getattr(weak, name)
        if ours != theirs:
            what = {"null_label": "classes", "state_shape": "the shape with class tokens"}.get(name, name)
            raise UserError(f"{stored.folder.url()}: {what} is {theirs}, but {ours} in the model that it is to guide")
    return weak


def _kept_tokens(generators: Sequence[torch.Generator], tokens: int, device: torch.device, drop: float) -> Tensor:
    """Draw the tokens of each image that skip no block, int64 [B, K], on the CPU as noise is."""
    return kept_tokens(torch.stack([torch.rand(tokens, generator=each) for each in generators]), drop).to(device)


def noise_of(indices: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise float32 [B, *shape], drawn on the CPU and therefore equal for all devices and batches."""
    return torch.stack([torch.randn(*shape, generator=torch_generator(seed, "sample", index)) for index in indices])
