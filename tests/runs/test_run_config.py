"""The configuration of a run: what belongs together is checked together, and every mistake is one line."""

import re

import pytest
import yaml

from vavae.config import digest, dump, load
from vavae.distributed.config import WorkersConfig
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.training_config import TrainingConfig

RUN = {
    "name": "tiny",
    "shards": {"source": "digits", "image_size": 32},
    "stream": {"lanes": 4},
    "tokenizer": {"channels": 32, "channel_multipliers": [1, 1, 1]},
    "train_vavae": {"images": 1000, "batch_size": 64},
    "lightningdit": {"size": None, "depth": 1, "width": 32, "heads": 2},
    "train_lightningdit": {"images": 1000, "batch_size": 64},
}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(RUN | {"tokenizer": RUN["tokenizer"] | {"attention_levels": []}}))
    return file


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["shards.image_size=30"],
            r"^\S*run.yaml: shards.image_size=30 is no multiple of 4, the tokenizer's downsampling",
        ),
        (["guidance.channels=33"], r"guidance.channels=33 exceeds tokenizer.latent_dim=32: lower it"),
        (["lightningdit.patch_size=3"], r"lightningdit.patch_size=3 does not divide the 8 x 8 latent"),
        (["train_vavae.batch_size=62"], r"train_vavae.batch_size=62 is no multiple of stream.lanes=4"),
        (["train_lightningdit.batch_size=6"], r"train_lightningdit.batch_size=6 is no multiple of stream.lanes=4"),
        (["stream.lanes=3"], r"train_vavae.batch_size=64 is no multiple of stream.lanes=3"),
        (["workers.count=5"], r"workers.count=5 exceeds stream.lanes=4: a worker needs a lane"),
        (
            ["train_vavae.schedule={warmup_images: 10, decay_images: 10}"],
            r"train_vavae.schedule .*decay_images=10 must be greater than warmup_images=10",
        ),
        (
            ["train_vavae.schedule={warmup_images: 10, decay_from_images: 9, decay_images: 20}"],
            r"train_vavae.schedule .*decay_from_images=9 must be at least warmup_images=10",
        ),
        (
            ["train_vavae.schedule={decay_from_images: 10, decay_images: 10}"],
            r"train_vavae.schedule .*decay_images=10 must be greater than decay_from_images=10",
        ),
        *(
            ([f"train_vavae.schedule={{{key}: {value}}}"], rf"{key}={value} is of a decay: give decay_images, or leave")
            for key, value in {"decay": "linear", "decay_from_images": 10, "final_factor": 0.1}.items()
        ),
        *(
            (
                [f"{section}.engine.{engine}", f"{section}.{optimizer}.muon={{}}"],
                rf"{section} .*[ :]{optimizer}.muon with {why}",
            )
            for section, optimizer in (
                ("train_vavae", "optimizer"),
                ("train_vavae", "discriminator_optimizer"),
                ("train_lightningdit", "optimizer"),
            )
            for engine, why in {
                "zero_stage=1": "engine.zero_stage=1: DeepSpeed flattens and divides the optimizer's state, and Muon "
                "needs whole matrices; set engine.zero_stage=0 without offload, or engine.backend=torch",
                "zero_stage=2": "engine.zero_stage=2: DeepSpeed flattens and divides gradients, and Muon",
                "zero_stage=3": "engine.zero_stage=3: DeepSpeed flattens and divides weights, and Muon",
                "offload_optimizer=true": "engine.offload_optimizer=true: DeepSpeed flattens what it updates in the",
            }.items()
        ),
        (
            ["train_lightningdit.optimizer.muon={scale: spectral}"],
            r"train_lightningdit.optimizer.muon.scale .*\"spectral\" should be 'match_rms_adamw', 'original' or",
        ),
        (["train_lightningdit.optimizer.muon={momentum: 1}"], r"optimizer.muon.momentum .*1 should be less than 1"),
        (["train_vavae.images=0"], r"train_vavae.images \(command line\): 0 should be greater than or equal to 1"),
        (["train_vavae.ema_decay=1"], r"train_vavae.ema_decay .*1 should be less than 1"),
        (
            ["train_vavae.ema_ramp=0.09"],
            r"train_vavae .*ema_ramp=0.09 ramps the average of the weights: give ema_decay, or set it null",
        ),
        (
            ["train_lightningdit.averages=[{name: a}]"],
            r"train_lightningdit.averages.0 .*the average a takes either a decay or the std of a power profile",
        ),
        (
            ["train_lightningdit.averages=[{name: a, decay: 0.9, std: 0.1}]"],
            r"train_lightningdit.averages.0 .*the average a takes either a decay or the std of a power profile",
        ),
        (
            ["train_lightningdit.averages=[{name: a, ramp: 0.09, std: 0.1}]"],
            r"ramp=0.09 limits a decay, and a is a power profile: leave it out",
        ),
        (["train_lightningdit.averages=[{name: a, std: 0.3}]"], r"averages.0.std .*0.3 should be less than 0.288"),
        (
            ["train_lightningdit.averages=[{name: a, std: 0.1}, {name: a, decay: 0.9}]"],
            r"averages have the names a, a: name each once",
        ),
        (
            ["train_lightningdit.averages=[{name: a, decay: 0.9}]", "train_lightningdit.average_snapshot_images=64"],
            r"average_snapshot_images=64 keeps averages by power profiles: give averages with a std, such as",
        ),
        (
            [
                "train_lightningdit.averages=[{name: a, decay: 0.9}]",
                "train_lightningdit.measure={every_images: 64, weights: b}",
            ],
            r"measure.weights=b is no average of this training; there are: a",
        ),
        (
            ["train_lightningdit.ema_decay=null", "train_lightningdit.measure={every_images: 64}"],
            r"measure evaluates an average of the weights: give ema_decay, or measure.weights, or leave measure out",
        ),
        *(
            ([f"guidance.weak={{scale: 2{more}}}"], r"guidance.weak .*weak takes either model, .* or checkpoint_images")
            for more in ("", ", model: runs/small, checkpoint_images: 64")
        ),
        (
            ["train_lightningdit.ema_decay=null", "guidance.weak={scale: 2, checkpoint_images: 64}"],
            r"checkpoint_images=64 guides by the average of the weights, and the training keeps none: give",
        ),
        *(
            ([f"train_lightningdit.keep_images=[64, {images}]"], rf"keep_images={images} must be a multiple of")
            for images in (0, 65)
        ),
        (["sample.weights=a/b"], r"sample.weights \(command line\): .*should match pattern"),
        (["train_lightningdit.ema_ramp=0"], r"train_lightningdit.ema_ramp .*0 should be greater than 0"),
        (["train_vavae.collapse_limit=0"], r"train_vavae.collapse_limit .*0 should be greater than or equal to 1"),
        (["name=../other"], r"name \(command line\): .*should match pattern"),
        (["name=.hidden"], r"name \(command line\): .*should match pattern"),
        (["train_vavae.imagse=3"], r"no such key; did you mean train_vavae.images\?"),
        (["tokenizer.channels=48"], r"channels 48 is not a multiple of norm_groups 32"),
        (["guidance.interval=[0.5, 0.1]"], r"interval=\[0.5, 0.1\] must satisfy"),
        (["solver.shift=0"], r"solver.shift \(command line\): 0 should be greater than 0 or should be 'by_dimension'"),
        (["sample.labels=some"], r"sample.labels \(command line\): \"some\" should be 'class_balanced' or 'random'"),
        (["sample.labels=[]"], r"sample.labels \(command line\): \[\] should .* or should have at least 1 item"),
        (["solver.name=rk45"], r"solver.name \(command line\): \"rk45\" should be 'euler', .*'dopri5' or 'mean_flow'"),
        (["lightningdit.heads=3"], r"width=32 must be a multiple of heads=3"),
    ],
)
def test_what_does_not_fit_is_one_line(path, overrides, message):
    with pytest.raises(UserError) as caught:
        load(RunConfig, path, overrides)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["workers.count=4"],
        ["lightningdit.patch_size=2"],
        ["shards.image_size=64", "lightningdit.patch_size=4"],
        ["train_vavae.schedule={warmup_images: 10, decay_images: 11}"],
        ["train_vavae.ema_decay=null"],
        ["train_vavae.schedule={warmup_images: 10, decay: linear, decay_from_images: 10, decay_images: 11}"],
        ["train_vavae.schedule={decay_images: 11, final_factor: 1}"],
        ["train_vavae.optimizer.muon={}", "train_vavae.engine.zero_stage=0"],
        ["train_vavae.discriminator_optimizer.muon={}", "train_vavae.engine.zero_stage=0"],
        ["train_lightningdit.optimizer.muon.scale=original", "train_lightningdit.engine.backend=torch"],
        ["train_vavae.ema_decay=0.9", "train_vavae.ema_ramp=0.09"],
        [
            "train_lightningdit.ema_decay=null",
            "train_lightningdit.averages=[{name: a, std: 0.1}]",
            "train_lightningdit.measure={every_images: 64, weights: a}",
        ],
    ],
)
def test_what_fits_is_taken(path, overrides):
    load(RunConfig, path, overrides)


def test_the_resolved_configuration_is_the_same_configuration(path, tmp_path):
    config = load(RunConfig, path, ["seed=3"])
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    "override",
    ["name=other", "storage.root=elsewhere", "workers.count=2", "stream.workers=3", "train_vavae.images=2000",
     "train_vavae.log_images=1", "train_vavae.collapse_limit=null",
     "train_vavae.engine.zero_stage=2", "sample.batch_size=1", "latents.actors=4"],
)  # fmt: skip
def test_how_a_run_is_carried_out_is_not_what_it_is(path, override):
    assert digest(load(RunConfig, path, [override])) == digest(load(RunConfig, path))


@pytest.mark.parametrize(
    "override",
    ["seed=1", "stream.lanes=2", "train_vavae.batch_size=32", "train_lightningdit.ema_decay=0.5",
     "train_lightningdit.ema_ramp=0.09", "train_lightningdit.averages=[{name: a, std: 0.1}]",
     "sample.weights=a", "sample.images=7",
     "train_lightningdit={optimizer: {muon: {}}, engine: {zero_stage: 0}}",
     "train_lightningdit.schedule={decay_images: 9, decay: linear}",
     "train_lightningdit.schedule={decay_images: 9, final_factor: 0.1}",
     "latents.flip=false", "guidance.scale=2", "solver.num_steps=3"],
)  # fmt: skip
def test_what_changes_results_changes_the_digest(path, override):
    assert digest(load(RunConfig, path, [override])) != digest(load(RunConfig, path))


def test_the_grid_is_the_size_over_the_downsampling(path):
    assert load(RunConfig, path).grid == (8, 8)
    assert load(RunConfig, path, ["shards.image_size=[32, 64]"]).grid == (8, 16)


def test_equal_sides_have_the_digest_of_one_number(path):
    assert digest(load(RunConfig, path, ["shards.image_size=[32, 32]"])) == digest(load(RunConfig, path))


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ("[32, 62]", r"shards.image_size=32 x 62 is no multiple of 4"),
        *(
            (size, rf"shards\.image_size \(command line\): {re.escape(size)} is no side in pixels from 8 on, and no")
            for size in ("[32]", "[32, 4]", "[32, 64, 3]", "wide", "7", "0.5")
        ),
    ],
)
def test_a_size_that_is_none_is_named(path, size, reason):
    with pytest.raises(UserError, match=reason):
        load(RunConfig, path, [f"shards.image_size={size}"])


@pytest.mark.parametrize(("images", "steps"), [(1, 1), (64, 1), (65, 2), (640, 10)])
def test_steps_cover_the_budget(images, steps):
    assert TrainingConfig(images=images, batch_size=64).steps == steps


def test_collectives_outlast_the_watchdog_and_the_stores(path):
    config = load(RunConfig, path, ["train_vavae.hang_seconds=100", "storage.operation_seconds=50"])
    assert config.collective_seconds("train_vavae") == 150
    waits = load(RunConfig, path, ["train_vavae.hang_seconds=null"])
    assert waits.collective_seconds("train_vavae") > 24 * 3600


@pytest.mark.parametrize(
    ("workers", "rounds"),
    [({}, False), ({"use_gpu": True}, True), ({"use_gpu": True, "deterministic": True}, False), ({"tf32": True}, True)],
)
def test_gpus_round_to_tf32_unless_bits_are_promised(workers, rounds):
    assert WorkersConfig(**workers).rounds_to_tf32 is rounds
