"""Benchmark of the LightningDiT's training step, against its own matrix products and attention alone."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vavae.bench.computation import Computation, Side, build_side, dense_peak
from vavae.bench.steps import StepTurns, assert_equal_steps, disturb
from vavae.data.sample_order import assign_lanes
from vavae.diffusion.flow_matching import FlowMatchingObjective
from vavae.distributed.engine import TorchEngine
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.latents.features import feature_shape
from vavae.latents.statistics import LatentNormalizer
from vavae.latents.stream import LatentMicroBatch, LatentStream
from vavae.models.dit.class_token import join_class_token
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import Predictions
from vavae.models.dit.routing import draw_tokens
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.training.diffusion_step import DiffusionStep, FlowMatchingModel
from vavae.training.ema import ExponentialMovingAverage
from vavae.training.flops.flops import training_flops

Way = Literal["compiled", "eager", "DeepSpeed"]
"""Ways to take the step: by the plain engine, with and without compiled blocks, and by DeepSpeed without."""
WAYS: tuple[Way, ...] = get_args(Way)
LIMIT, PEER = "its products alone", "peer"
_CLASSES = 1000
_PRODUCTS = (F.linear, F.scaled_dot_product_attention)


def parse_ways(text: str) -> list[Way]:
    """Parse a list such as `compiled,eager`.

    Raises:
        UserError: there is no such side.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WAYS:
            raise UserError(f"--sides {text}: {name!r} is none of {', '.join(WAYS)}")
    return [way for way in WAYS if way in names]


def lightningdit_benchmark(
    config: RunConfig, world: World, ways: Sequence[Way] = WAYS, peer: str | None = None
) -> Computation:
    """Benchmark of the step, after asserting that all ways to take it agree.

    Args:
        config: configuration of a run; `stream.lanes` micro-batches are shared by the ranks.
        world: the ranks.
        ways: sides to measure beside the products alone.
        peer: `module:Class` of a network with the constructor and the names of the public code's LightningDiT, to be
            trained by the plain engine in place of ours.

    Raises:
        UserError: the peer is not to be had, or it is no step of velocities.
    """
    if config.objective.mean_flow is not None:
        raise UserError("objective.mean_flow: only steps of velocities are compared: leave it out")
    training, images = config.train_lightningdit, config.train_lightningdit.batch_size // world.size

    def flops() -> float:
        return images * training_flops(config, "train_lightningdit")

    turns: dict[str, StepTurns] = {}
    sides: dict[str, Side] = {}
    for way in ways:
        sides[way] = build_side(partial(_add_turns, turns, way, config, world), flops, world.device)
    assert_equal_steps(turns, _tolerance(config, world.device))
    step = cast(DiffusionStep, next(iter(turns.values())).step)
    if peer is not None:
        sides[PEER] = build_side(partial(_Peer, config, step.model, peer, world), flops, world.device)
    sides[LIMIT] = build_side(partial(_Products, config, step.model, world), flops, world.device)
    pairs = [(way, LIMIT) for way in ways]
    pairs += [(way, "eager") for way in ways if way != "eager" and "eager" in ways]
    pairs += [(way, PEER) for way in ways if peer is not None]
    depth, width, _ = config.lightningdit.shape
    name = f"LightningDiT step, {training.batch_size} images, depth {depth}, width {width}, {training.precision}"
    peak = dense_peak(world.device, training.precision, config.workers.rounds_to_tf32)
    return Computation(name, images, sides, pairs, world.device, peak)


def _tolerance(config: RunConfig, device: torch.device) -> float:
    """Relative tolerance of losses and gradient norms that are computed in another order."""
    if config.train_lightningdit.precision == "bf16":
        return 2e-2
    return 1e-5 if device.type == "cpu" else 1e-3  # GPUs may round factors to TF32


def _add_turns(turns: dict[str, StepTurns], way: Way, config: RunConfig, world: World) -> StepTurns:
    training = config.train_lightningdit
    backend = "deepspeed" if way == "DeepSpeed" else "torch"
    engine = training.engine.model_copy(update={"backend": backend, "offload_optimizer": False})
    # A pass is a lane, for every side alike.
    how = {"engine": engine, "compile_blocks": way == "compiled", "lanes_at_once": 1}
    training = training.model_copy(update=how)
    model = config.lightningdit.with_classes(config.lightningdit.classes or _CLASSES)
    dim = config.tokenizer.latent_dim
    normalizer = LatentNormalizer(torch.zeros(dim), torch.ones(dim))
    run = config.model_copy(update={"train_lightningdit": training})
    # The stream is what the trainer reads from; here micro-batches are at hand.
    step = DiffusionStep(run, model, cast(LatentStream, None), normalizer, world)
    disturb(step.engines)
    lanes = assign_lanes(config.stream.lanes, world.rank, world.size)
    turns[way] = StepTurns(step, [_micro_batch(config, each.lane, world.device) for each in lanes], training)
    return turns[way]


def _micro_batch(config: RunConfig, lane: int, device: torch.device) -> LatentMicroBatch:
    """Latents of one micro-batch, as a loader hands them over."""
    shape = (config.train_lightningdit.batch_size // config.stream.lanes, *config.latent_shape)
    rng = torch_generator(0, "bench", lane)
    mean = torch.randn(shape, generator=rng)
    labels = torch.randint(0, config.lightningdit.classes or _CLASSES, (len(mean),), generator=rng)
    tensors = [mean, torch.full_like(mean, 0.1), labels]
    if config.reads_features and config.latents.features is not None:
        of_an_image = feature_shape(config.latents.features, config.grid)
        tensors.append(torch.randn(len(mean), *of_an_image, generator=rng).bfloat16())
    return LatentMicroBatch(lane, 0, *(tensor.pin_memory() if device.type == "cuda" else tensor for tensor in tensors))


class _Inputs(NamedTuple):
    """Arguments of `FlowMatchingModel.forward`, of one micro-batch."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor
    keep: Tensor | None

    @staticmethod
    def drawn(config: RunConfig, device: torch.device) -> "_Inputs":
        """Inputs of the first lane."""
        item = _micro_batch(config, 0, device)
        noise = torch.randn(item.mean.shape, generator=torch_generator(0, "bench", "noise"))
        timesteps = torch.rand(len(noise), generator=torch_generator(0, "bench", "timesteps"))
        keep, routing, tokens = None, config.lightningdit.routing, config.lightningdit.tokens_of(config.grid)
        if routing is not None:
            keep = draw_tokens(routing, tokens, len(noise), torch_generator(0, "bench", "routing")).to(device)
        latents = item.mean
        if config.lightningdit.class_token is not None and item.features is not None:
            token = item.features[:, 0].float()
            latents, noise = join_class_token(latents, token), join_class_token(noise, token.flip(0))
        latents, noise, timesteps, labels = (each.to(device) for each in (latents, noise, timesteps, item.labels))
        return _Inputs(latents, noise, timesteps, labels, keep)


class _Product(NamedTuple):
    """A matrix product with weights, or attention; and its backward pass."""

    function: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    differentiated: Sequence[Tensor]

    def compute(self) -> None:
        """Compute the product and the gradients of its factors."""
        output = self.function(*self.inputs)
        torch.autograd.grad(output, self.differentiated, output.detach())


class _Products(TorchFunctionMode):
    """Turns of the matrix products and attentions of a model alone, forward and backward: what no step falls below.

    Factors lie in memory in the precision of the training. Gradients of additive terms are left out.

    Args:
        config: configuration of the run.
        model: model whose products are noted, in one forward pass.
        world: the ranks.
    """

    def __init__(self, config: RunConfig, model: FlowMatchingModel, world: World) -> None:
        super().__init__()
        self._dtype = torch.bfloat16 if config.train_lightningdit.precision == "bf16" else torch.float32
        self._passes = len(assign_lanes(config.stream.lanes, world.rank, world.size))
        self._products: list[_Product] = []
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), self:
            model(*_Inputs.drawn(config, world.device))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Note the inputs of a product, and compute it."""
        if func in _PRODUCTS:
            inputs = [each.detach().to(self._dtype, copy=True) for each in args]
            # What F.linear adds to its product is its third argument.
            differentiated = [each.requires_grad_() for each in inputs[: 2 if func is F.linear else 3]]
            self._products.append(_Product(func, inputs, differentiated))
        return func(*args, **(kwargs or {}))

    def __call__(self) -> None:
        """Compute all products of one step."""
        for _ in range(self._passes):
            for product in self._products:
                product.compute()


class _Peer:
    """Steps of a network of other code in place of ours: the same objective, engine and average of weights.

    Args:
        config: configuration of the run.
        ours: our model, whose weights and losses it has.
        name: `module:Class`.
        world: the ranks.
    """

    def __init__(self, config: RunConfig, ours: FlowMatchingModel, name: str, world: World) -> None:
        training = config.train_lightningdit
        if config.lightningdit.routing is not None:
            raise UserError(f"--peer {name}: its tokens skip no block: leave out lightningdit.routing, or --peer")
        network = _public_network(config, name)
        # Their tables of positions are buffers, and ours are none of the state.
        missing, unknown = network.load_state_dict(ours.model.state_dict(), strict=False)
        unset = [*unknown, *({*missing} & {name for name, _ in network.named_parameters()})]
        if unset:
            raise UserError(
                f"--peer {name}: {unset[0]} is a weight of one network alone; give one with the public names"
            )
        # Type: it has all that is used.
        predicting = cast(Any, _Predicting(network, config.lightningdit, ours.model.latent_dim))
        model = FlowMatchingModel(predicting.to(world.device), FlowMatchingObjective(config.objective))
        self._inputs = _Inputs.drawn(config, world.device)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found, expected = (each(*self._inputs)[0].item() for each in (model, ours))
        if abs(found - expected) > _tolerance(config, world.device) * abs(expected):
            raise UserError(
                f"--peer {name}: its loss is {found!r} with our weights, ours {expected!r}: another network"
            )
        if training.precision == "bf16":
            autocast = torch.autocast(world.device.type, torch.bfloat16, cache_enabled=False)
            model.forward = autocast(model.forward)  # type: ignore[method-assign]
        lanes = assign_lanes(config.stream.lanes, world.rank, world.size)
        self._engine = TorchEngine(model, training.optimizer, training.engine, world, len(lanes))
        self._ema = ExponentialMovingAverage(self._engine, training.ema_decay, world) if training.ema_decay else None
        self._passes, self._learning_rate = len(lanes), training.optimizer.learning_rate

    def __call__(self) -> None:
        """Take one step."""
        for _ in range(self._passes):
            loss, *_ = self._engine.forward(*self._inputs)
            self._engine.backward(loss)
        self._engine.update(self._learning_rate)
        if self._ema is not None:
            self._ema.update()


class _Predicting(nn.Module):
    """Network of other code, with the one output layer that it has."""

    def __init__(self, network: nn.Module, config: LightningDiTConfig, latent_dim: int) -> None:
        super().__init__()
        self.network, self.config, self.latent_dim = network, config, latent_dim

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        keep: Tensor | None,
        path_dropped: Tensor | None,
        data_floor: float,
        tokens_after: int | None,
        end: Tensor | None,
        guidance: Tensor | None,
    ) -> Predictions:
        """See `LightningDiT.predict`; the output is a velocity."""
        assert keep is path_dropped is None, "it has no blocks that tokens skip"
        assert end is guidance is None, "it predicts no average velocities"
        return Predictions(self.network(x, t, y), None)


def _public_network(config: RunConfig, name: str) -> Any:
    """Build a network with the constructor of the public code's LightningDiT; it drops no labels by itself."""
    module, _, attribute = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--peer {name}: {error}; give module:Class, found on PYTHONPATH") from error
    dit = config.lightningdit
    depth, width, heads = dit.shape
    if isinstance(config.shards.image_size, tuple):
        raise UserError(f"--peer {name}: the public code has square images, shards.image_size has two sides")
    if dit.predicts_data:
        raise UserError(f"--peer {name}: the public code predicts velocities, but lightningdit.prediction=data")
    return build(
        input_size=config.grid[0],
        patch_size=dit.patch_size,
        in_channels=config.tokenizer.latent_dim,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        num_classes=dit.classes or _CLASSES,
        learn_sigma=False,
        use_qknorm=dit.qk_norm,
        use_swiglu=dit.mlp == "swiglu",
        use_rope=dit.rope,
        use_rmsnorm=dit.norm == "rmsnorm",
        wo_shift=not dit.shift,
    ).eval()
