"""Options of the tokenizer's training beyond the paper: every engine, exact resume, and what they leave alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image
from pydantic import ValidationError
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from support.training_steps import LANES, DrawnImages, build_step, figures_of, tiny_config
from torch import Tensor

from vavae.data.image_stream import MicroBatchKey
from vavae.data.loader import load_micro_batches
from vavae.data.pixels import to_float
from vavae.data.sample_order import assign_lanes
from vavae.distributed.world import World
from vavae.losses.latents import MicroBatchTransforms
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.storage.storage import Storage
from vavae.training.callbacks.tokenizer import LatentProbe, ReconstructionPreview
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.step import Step
from vavae.training.tokenizer_step import TokenizerStep

STEPS = 2
ENGINES = [TORCH, *ZERO]
ON_FEATURES: dict[str, Any] = {
    "kind": "features",
    "start_images": 0,
    "features": {"name": "efficientnet_lite0", "image_size": 64, "layers": [4, 2, 3, 4], "kernel": 3},
    "augment": {"cutout": 0.2},
}
"""An adversary on the features of a network that is there."""
OPTIONS: dict[str, dict[str, Any]] = {
    "added noise and features": {"latent_noise": {"kind": "add", "scale": 0.8}, "adversarial": ON_FEATURES},
    "interpolated noise and equivariance": {
        "latent_noise": {},
        "equivariance": {"small_images": 0.5, "min_scale": 0.5},
        "adaptive": {"every": 2},
    },
}
"""By name: what each writes into the losses."""
TURNED = {"equivariance": {"probability": 1, "min_scale": 0.5}}
SMALL = {"equivariance": {"probability": 0, "small_images": 1, "min_scale": 0.5}}


def option_config(name: str, engine: dict[str, Any]) -> RunConfig:
    """The tiny configuration with options."""
    return tiny_config(losses=OPTIONS[name], engine=engine)


def take(step: Step, world: World, numbers: range) -> list[dict[str, float]]:
    """Figures of some steps."""
    stream = load_micro_batches(step.source(), assign_lanes(LANES, world.rank, world.size), numbers.start, workers=0)
    return [figures_of(step.run(next(stream), number * LANES, 1e-4), world) for number in numbers]


def weights_of(step: Step) -> dict[str, Tensor]:
    """Weights of all engines."""
    return {
        f"{name}.{key}": tensor for name, engine in step.engines.items() for key, tensor in engine.weights().items()
    }


def train_with_every_engine(world: World, folder: str) -> dict[str, list[list[dict[str, float]]]]:
    """Figures of each step, by option, then by engine; on the way, the first is resumed in the middle to its bits."""
    figures = {}
    for index, name in enumerate(OPTIONS):
        configs = [option_config(name, engine) for engine in ENGINES]
        steps = [build_step("train_vavae", each, world) for each in configs]
        figures[name] = [take(step, world, range(STEPS)) for step in steps]
        fresh, half = TrainState(images_seen=0, config="c", data="d"), STEPS // 2
        first, second = (build_step("train_vavae", configs[0], world) for _ in range(2))
        take(first, world, range(half))
        storage = Storage(f"{folder}/{index}")
        checkpoints = Checkpoints(storage, fresh, Retention(2), world)
        checkpoints.save(first, fresh.after(half * LANES), {}, lambda: None)
        checkpoints.wait_for_pending_save()
        Checkpoints(storage, fresh, Retention(2), world).restore(second)
        take(second, world, range(half, STEPS))
        resumed = weights_of(second)
        for weight, tensor in weights_of(steps[0]).items():
            assert tensor.equal(resumed[weight]), (name, weight)
    return figures


@pytest.mark.gloo
def test_every_engine_takes_the_same_steps_and_resumes_to_the_same_bits(gloo: GlooLauncher, tmp_path: Path) -> None:
    of_two = gloo.run(2, train_with_every_engine, str(tmp_path))[0]
    for name, (plain, *others) in of_two.items():
        alone = take(build_step("train_vavae", option_config(name, TORCH), World()), World(), range(STEPS))
        for engine, figures in zip(["one rank", *ENGINES[1:]], [alone, *others], strict=True):
            for step, (ours, theirs) in enumerate(zip(figures, plain, strict=True)):
                assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), (name, engine, step)


@pytest.mark.parametrize("losses", [{"latent_noise": {}}, {"latent_noise": {"kind": "add"}}, TURNED])
def test_an_option_changes_what_is_decoded_alone(losses: dict[str, Any]) -> None:
    """Alignment and KL are those of the posterior sample, whatever is decoded."""
    plain, ours = (
        take(build_step("train_vavae", tiny_config(losses=each, engine=TORCH), World()), World(), range(1))[0]
        for each in ({}, losses)
    )
    assert ours.keys() == plain.keys()
    same = ("loss/kl", "loss/cosine", "loss/distance", "alignment")
    assert [ours[each] for each in same] == [plain[each] for each in same]
    assert ours["loss/l1"] != plain["loss/l1"]
    assert all(map(math.isfinite, ours.values()))


class Recorded:
    """Values that a callback logs, by name."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.pixels = b""

    def add(self, images_seen: int, values: dict[str, float]) -> None:
        self.values |= values

    def picture(self, images_seen: int, name: str, picture: Image, folder: Storage) -> None:
        self.pixels = picture.tobytes()


def test_probes_and_previews_are_made_without_any_option(tmp_path: Path) -> None:
    images, recorded = DrawnImages()[MicroBatchKey(0, 0)].images, []
    for losses in ({}, {"latent_noise": {}, **TURNED}):
        config, record = tiny_config(losses=losses, engine=TORCH), Recorded()
        step = build_step("train_vavae", config, World())
        LatentProbe(config, images, 1, World()).on_interval(step, 0, record)
        ReconstructionPreview(config, images, 1, Storage(str(tmp_path)), World()).on_interval(step, 0, record)
        recorded.append(record)
    plain, ours = recorded
    assert ours.values == plain.values
    assert plain.values.keys() >= {"latent/channel_std_max"}
    assert ours.pixels == plain.pixels != b""


@pytest.mark.parametrize("losses", [TURNED, SMALL])
def test_the_discriminator_compares_what_the_generator_was_trained_on(
    losses: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(losses=losses, engine=TORCH)
    step = build_step("train_vavae", config, World())
    adversary, seen = step.engines["discriminator"], []
    forward = adversary.forward
    monkeypatch.setattr(adversary, "forward", lambda *inputs: seen.append(inputs) or forward(*inputs))
    take(step, World(), range(1))
    for lane, (target, reconstruction, _) in enumerate(seen):
        rng = torch_generator(config.seed, "equivariance", lane, 0)
        drawn = MicroBatchTransforms.draw(config.losses.equivariance, config.grid, rng)
        transform = drawn.images or drawn.latents
        assert transform is not None
        assert (drawn.latents is None) == (losses is SMALL)
        images = to_float(DrawnImages()[MicroBatchKey(lane, 0)].images)
        assert torch.equal(target, transform.apply(images, config.tokenizer.downsample))
        assert target.shape == reconstruction.shape
    assert len({target.shape for target, *_ in seen}) > 1


def test_a_decoder_tuned_alone_leaves_the_encoder_its_bits() -> None:
    """In the weights, in their average, which is exported, and in what the encoder makes of an image."""
    alone = {"frozen": ["encoder", "projection"]}
    config = tiny_config(alone, {"vision_foundation": {"weight": 0}}, engine=TORCH)
    step = build_step("train_vavae", config, World())
    assert isinstance(step, TokenizerStep)
    assert step.ema is not None
    images = to_float(DrawnImages()[MicroBatchKey(0, 0)].images)
    with torch.no_grad():
        before, latents = weights_of(step), step.model.autoencoder.encode(images)
    for number in range(2):
        take(step, World(), range(number, number + 1))
        step.ema.update()
    frozen = ("autoencoder.encoder.", "autoencoder.quant_conv.", "alignment.")
    for after in (weights_of(step), {f"generator.{name}": tensor for name, tensor in step.ema.weights().items()}):
        same = {name for name in after if torch.equal(after[name], before[name])}
        assert {name for name in after if name.removeprefix("generator.").startswith(frozen)} <= same
        assert not {name for name in after if ".decoder." in name and name.endswith("weight")} & same
    with torch.no_grad():
        again = step.model.autoencoder.encode(images)
    assert torch.equal(again.mean, latents.mean)
    assert torch.equal(again.logvar, latents.logvar)
    for name, parameter in step.model.named_parameters():
        assert name.startswith(frozen) == (parameter.grad is None and not parameter.requires_grad), name


def test_a_discriminator_on_features_trains_its_heads_alone() -> None:
    """Augmentations are draws of lane and step, three of a micro-batch; the network is in no engine, nor changed."""
    step = build_step("train_vavae", tiny_config(losses={"adversarial": ON_FEATURES}, engine=TORCH), World())
    assert isinstance(step, TokenizerStep)
    network = step._frozen_features
    assert network is not None
    before, frozen = weights_of(step), {name: tensor.clone() for name, tensor in network.state_dict().items()}
    figures = take(step, World(), range(2))
    assert all(map(math.isfinite, figures[1].values()))
    assert figures[1]["adaptive_weight/adversarial"] > 0
    after = {name: tensor for name, tensor in weights_of(step).items() if name.startswith("discriminator.")}
    assert {name.split(".")[2] for name in after} == {"heads"}
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name for name in after if name.endswith(("weight_orig", "weight_v"))} <= moved
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in network.state_dict().items())

    def draws(lane: int, number: int) -> list[Tensor]:
        views = step._views(DrawnImages()[MicroBatchKey(lane, number)])
        return [view.keywords["augmentation"].uniform for view in views]

    three = draws(1, 2)
    assert all(one.equal(two) for one, two in zip(three, draws(1, 2), strict=True))
    assert len({tuple(each.flatten().tolist()) for each in (*three, *draws(0, 2), *draws(1, 3))}) == 9


@pytest.mark.parametrize(
    ("losses", "training", "message"),
    [
        ({"equivariance": {"min_scale": 0.9}}, {}, "min_scale=0.9 leaves no smaller size to a 8 x 8 latent"),
        (
            {"equivariance": {"min_scale": 0.3}},
            {},
            "min_scale=0.3 makes images of 6 x 6 pixels, of which losses.adversarial needs 12 along each side",
        ),
        (
            {"equivariance": {"min_scale": 0.8}, "perceptual": {"kind": "lpips"}},
            {},
            "of 14 x 14 pixels, of which losses.perceptual needs 16",
        ),
        (
            {"equivariance": {"min_scale": 0.5}},
            {"compile_blocks": True},
            "compile_blocks=true with losses.equivariance",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(losses: dict[str, Any], training: dict[str, Any], message: str) -> None:
    adversarial = {"start_images": 0, "channels": 32, "layers": 2}
    with pytest.raises(ValidationError, match=message):
        tiny_config(losses={"adversarial": adversarial, **losses}, train_vavae=training)


def test_teachers_see_the_smallest_latent_too() -> None:
    plain = tiny_config(losses={"equivariance": {"min_scale": 0.5, "small_images": 0}})
    assert plain.smallest_grid == plain.grid == (8, 8)
    assert tiny_config(losses={"equivariance": {"min_scale": 0.5}}).smallest_grid == (4, 4)
    stage = {"from_images": 8, "losses": {"equivariance": {"small_images": 0.2}}}
    assert tiny_config({"stages": [stage]}, losses=plain.losses.model_dump()).smallest_grid == (4, 4)
