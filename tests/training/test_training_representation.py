"""Training of a representation autoencoder: its decoder alone, with every engine, and on to the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from support import in_process
from support.chain import ImpatientSession
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from support.representation import DIM, representation_config
from support.training_steps import BATCH, LANES, build_step, figures_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import assign_lanes
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.interop import export
from vavae.interop.export import DESCRIPTION, WEIGHTS, load_exported_lightningdit, load_exported_tokenizer, save_export
from vavae.interop.import_export import export_latents, export_tokenizer, import_tokenizer
from vavae.latents.manifest import read_latent_manifest, read_latents_of
from vavae.models.tokenizer.representation import (
    RepresentationAutoencoder,
    RepresentationEncoder,
    build_autoencoder,
    load_encoder,
)
from vavae.models.tokenizer.teacher import VisionFoundationTeacher
from vavae.planning.sizes import latent_bytes, trained_parameters
from vavae.planning.training import frozen_bytes
from vavae.randomness import numpy_generator
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.runs.training_inputs import begin_training
from vavae.sampling.sampler import Sampler
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.flops.flops import decoding_flops, encoding_flops, training_flops
from vavae.training.session import LocalSession
from vavae.training.tokenizer_step import TokenizerStep
from vavae.training.train import train
from vavae.training.warm_start import starting_weights

STEPS = 3


def build(world: World, engine: dict[str, Any]) -> TokenizerStep:
    """A step with the adversary from the first image on, and with noise on what is decoded."""
    optimizer = {"learning_rate": 1e-3}
    noise = {"latent_noise": {"kind": "add", "scale": 0.8}}
    config = representation_config(
        losses=noise, train_vavae={"engine": engine, "optimizer": optimizer, "ema_decay": 0.9}
    )
    step = build_step("train_vavae", config, world)
    assert isinstance(step, TokenizerStep)
    return step


def encoder_of(step: TokenizerStep) -> RepresentationEncoder:
    """The frozen encoder."""
    assert isinstance(step.model.autoencoder, RepresentationAutoencoder)
    return step.model.autoencoder.encoder


def take(step: TokenizerStep, world: World, numbers: range) -> list[dict[str, float]]:
    """Figures of some steps, at the end of each of which the average follows."""
    stream, figures = (
        load_micro_batches(step.source(), assign_lanes(LANES, world.rank, world.size), numbers.start, 0),
        [],
    )
    for number in numbers:
        figures.append(figures_of(step.run(next(stream), number * BATCH, 1e-3), world))
        assert step.ema is not None
        step.ema.update()
    return figures


def weights_of(step: TokenizerStep) -> dict[str, Tensor]:
    """Weights of both engines and of the average, on rank 0."""
    assert step.ema is not None
    states = {**{name: engine.weights() for name, engine in step.engines.items()}, "average": step.ema.weights()}
    return {f"{part}.{name}": tensor for part, state in states.items() for name, tensor in state.items()}


def train_with_every_engine(world: World, folder: str) -> list[list[dict[str, float]]]:
    """Figures of each step by engine; on the way, halfway through the first is resumed to its bits."""
    steps = [build(world, engine) for engine in (TORCH, *ZERO)]
    before = encoder_of(steps[0]).weights_digest()
    figures = [take(step, world, range(STEPS)) for step in steps]
    fresh, half = TrainState(images_seen=0, config="c", data="d"), STEPS // 2
    first, second = (build(world, TORCH) for _ in range(2))
    take(first, world, range(half))
    checkpoints = Checkpoints(Storage(folder), fresh, Retention(2), world)
    checkpoints.save(first, fresh.after(half * BATCH), {}, lambda: None)
    checkpoints.wait_for_pending_save()
    Checkpoints(Storage(folder), fresh, Retention(2), world).restore(second)
    take(second, world, range(half, STEPS))
    ours, resumed = weights_of(steps[0]), weights_of(second)
    assert ours.keys() == resumed.keys()
    assert all(tensor.equal(resumed[name]) for name, tensor in ours.items())
    assert {encoder_of(step).weights_digest() for step in (*steps, second)} == {before}
    return figures


@pytest.mark.gloo
def test_every_engine_takes_the_same_steps_and_goes_on_to_the_same_bits(gloo: GlooLauncher, tmp_path: Path) -> None:
    plain, *others = gloo.run(2, train_with_every_engine, str(tmp_path))[0]
    for engine, figures in zip(ZERO, others, strict=True):
        for step, (ours, theirs) in enumerate(zip(figures, plain, strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), (engine, step)


def test_only_the_decoder_is_trained_and_no_gradient_is_computed_for_the_encoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, graphs = build(World(), TORCH), []
    encode = RepresentationEncoder.forward

    def recorded(encoder: nn.Module, images: Tensor, grid: tuple[int, int]) -> Tensor:
        z = encode(encoder, images, grid)  # type: ignore[arg-type]
        graphs.append(z.grad_fn)
        return z

    monkeypatch.setattr(RepresentationEncoder, "forward", recorded)
    before = weights_of(step)
    assert step.model.alignment is None
    assert all(name.startswith("generator.autoencoder.decoder.") for name in before if name.startswith("generator."))
    digest = encoder_of(step).weights_digest()
    (figures,) = take(step, World(), range(1))
    assert graphs == [None] * LANES
    assert not any(each.grad is not None for each in encoder_of(step).parameters())
    assert encoder_of(step).weights_digest() == digest
    after = weights_of(step)
    moved = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    decoder = {name for name in before if name.startswith("generator.")}
    assert decoder <= moved
    assert "loss/kl" not in figures
    assert "loss/cosine" not in figures
    assert figures["adaptive_weight/adversarial"] > 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"losses": {"kl_weight": 1e-6}}, r"losses\.kl_weight=1e-06 trains an encoder"),
        ({"losses": {"vision_foundation": {"weight": 0.1}}}, r"losses\.vision_foundation\.weight=0\.1 trains"),
        (
            {"train_vavae": {"stages": [{"from_images": BATCH, "losses": {"kl_weight": 0.5}}]}},
            r"losses\.kl_weight=0\.5 trains an encoder",
        ),
        ({"train_vavae": {"frozen": ["encoder"]}}, r"frozen=\['encoder'\]: of tokenizer\.kind=representation"),
        (
            {"latents": {"statistics": "position", "normalization": "tokenizer"}},
            r"normalization=tokenizer stands in for",
        ),
        ({"latents": {"statistics": "position", "scale": 0.5}}, r"scale=0\.5 stands in for statistics of channels"),
    ],
)
def test_what_does_not_go_with_a_frozen_encoder_is_one_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        representation_config(**sections)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run from images to samples, its trainings in two attempts each."""
    root = tmp_path_factory.mktemp("representation")
    rng = numpy_generator(0, "images")
    for index in range(24):
        folder = root / "images" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    plain = {"engine": TORCH, "images": 2 * BATCH, "preview_images": BATCH, "checkpoint_images": BATCH}
    config = representation_config(
        shards={"source": str(root / "images"), "shard_images": 6, "validation_fraction": 0.25},
        storage={"root": str(root)},
        train_vavae={**plain, "probe_images": BATCH},
        latents={"statistics": "position", "batch_size": 4},
        train_lightningdit={**plain, "ema_decay": 0.5},
        solver={"name": "euler", "num_steps": 2},
        sample={"images": 4, "shard_images": 2},
    )
    run = Run(config)
    write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, in_process.ignore)
    for session in (ImpatientSession(), LocalSession()):
        train(begin_training(run, "train_vavae", World()), session, World())
    in_process.precompute_latents(run)
    for session in (ImpatientSession(), LocalSession()):
        train(begin_training(run, "train_lightningdit", World()), session, World())
    in_process.sample(run)
    return run


def test_a_run_goes_from_images_to_samples(chain: Run) -> None:
    latents = chain.folder("precompute_latents")
    manifest = read_latent_manifest(latents)
    assert (manifest.kind, manifest.statistics, manifest.shape) == ("representation", "position", (DIM, 2, 2))
    assert manifest.record_shape == (2, DIM, 2, 2)
    assert chain.artifact("sample") is not None
    _, description = load_exported_lightningdit(chain.folder("train_lightningdit"))
    assert description.statistics == "position"
    rows = [line for line in chain.training_folder("train_vavae").list("log")]
    assert rows


def test_an_export_names_its_encoder_and_comes_back_to_the_bit(chain: Run, tmp_path: Path) -> None:
    folder = chain.folder("train_vavae")
    tokenizer, description = load_exported_tokenizer(folder)
    assert description.tokenizer == chain.config.tokenizer
    assert isinstance(tokenizer, RepresentationAutoencoder)
    assert description.encoder_weights == tokenizer.encoder.weights_digest()
    assert chain.artifact("train_vavae").files.keys() == {"model.safetensors", "model.yaml"}  # type: ignore[union-attr]
    assert all(name.startswith("decoder.") for name in tokenizer.state_dict())
    storage = Storage(str(tmp_path))
    save_export(storage, description, {WEIGHTS: tokenizer.state_dict()})
    again, same = load_exported_tokenizer(storage)
    assert same == description
    images = torch.rand(2, 3, 16, 16)
    z = tokenizer.encode(images).mode
    assert again.encode(images).mode.equal(z)
    assert again.decode(z).equal(tokenizer.decode(z))
    alone, _ = load_exported_tokenizer(storage, encodes=False)
    assert alone.decode(z).equal(tokenizer.decode(z))
    text = storage.read_bytes(DESCRIPTION).decode()
    assert description.encoder_weights is not None
    storage.write_bytes(DESCRIPTION, text.replace(description.encoder_weights, 64 * "f").encode())
    with pytest.raises(UserError, match=r"made with weights ffff\w* of the encoder efficientnet_lite0, but those here"):
        load_exported_tokenizer(storage)


def test_latents_of_another_kind_or_other_statistics_are_refused(chain: Run) -> None:
    latents, tokenizer = chain.folder("precompute_latents"), chain.require("train_vavae").digest
    shape = (DIM, 2, 2)
    read_latents_of(latents, tokenizer, shape, "representation", "position")
    with pytest.raises(UserError, match=r"latents of tokenizer\.kind=representation \(tokenizer \w{12}\), but kl is"):
        read_latents_of(latents, tokenizer, shape)
    with pytest.raises(UserError, match=r"latents of latents\.statistics=position .* but channel is configured"):
        read_latents_of(latents, tokenizer, shape, "representation", "channel")
    with pytest.raises(
        UserError, match=r"latents of the tokenizer \w{12}, but the run's is xx; run precompute_latents"
    ):
        read_latents_of(latents, "xx", shape, "representation", "position")
    inputs = SamplingInputs.of(chain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "read_statistics", lambda _: (torch.zeros(DIM), torch.ones(DIM)))
        with pytest.raises(UserError, match=r"normalized per position, but .* has statistics per channel"):
            Sampler.load(inputs)


def test_other_layouts_are_refused_in_one_line(chain: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a tokenizer of kind representation, and other layouts are of kind kl"):
        export_tokenizer(chain.stored("train_vavae"), str(tmp_path / "released.pt"))
    with pytest.raises(UserError, match="latents of kind representation with statistics per position"):
        export_latents(chain.stored("precompute_latents"), Storage(str(tmp_path)), 0)
    with pytest.raises(UserError, match="a released tokenizer is of kind kl"):
        import_tokenizer(chain.config, chain.output("train_vavae"), "released.pt")


def test_a_decoder_begins_with_that_of_an_export(chain: Run) -> None:
    url = chain.folder("train_vavae").url()
    train_vavae = chain.config.train_vavae.model_copy(update={"start_from": url})
    start = starting_weights(chain.config.model_copy(update={"train_vavae": train_vavae}), DIM)
    assert start is not None
    assert {name.rsplit(".")[1] for name in start.engines["generator"]} == {"decoder"}


def test_the_plan_counts_a_decoder_that_is_trained_and_points_that_are_stored() -> None:
    config = representation_config(latents={"flip": True})
    encoder = load_encoder(config.tokenizer)
    assert encoder is not None
    autoencoder = build_autoencoder(config.tokenizer, encoder)
    decoder = sum(each.numel() for each in autoencoder.parameters())
    assert trained_parameters(config, "train_vavae")["generator"] == decoder
    counter = FlopCounterMode(display=False)
    with counter:
        z = autoencoder.encode(torch.zeros(1, 3, 16, 16)).mode
    assert encoding_flops(config) == counter.get_total_flops() > 0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        autoencoder.decode(z)
    assert decoding_flops(config) == counter.get_total_flops()
    teacher = 4 * sum(each.numel() for each in VisionFoundationTeacher(config.teacher).model.parameters())
    assert frozen_bytes(config, "train_vavae") == 2 * teacher
    values = DIM * 2 * 2
    assert 2 * 2 * values < latent_bytes(config) < 2 * 2 * values + 4096  # float16 points of both views, and a tar
    with_adversary = training_flops(config, "train_vavae")
    assert with_adversary > encoding_flops(config) + 3 * decoding_flops(config)
