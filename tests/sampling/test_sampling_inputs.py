"""The samples of a run: what they are made of, and what makes them again."""

from types import SimpleNamespace

import pytest
from support import small_models
from support.toy_training import no_log
from support.trained_run import DIGEST, trained_run

from vavae.distributed.sharded_tensors import as_full_shard
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.runs.evaluation_inputs import CheckpointEvaluationInputs
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.sample_shards import SampleSet
from vavae.sampling.sampler import Sampler
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the run is, with its samples."""
    run = trained_run(tmp_path_factory.mktemp("runs"))
    inputs = SamplingInputs.of(run)
    samples, sampler = SampleSet.of(inputs), Sampler.load(inputs)
    for shard in samples.shards():
        samples.generate(shard, sampler, lambda _: None)
    return run.storage.url()


def done(made, *overrides):
    samples = SampleSet.of(SamplingInputs.at(made, overrides))
    return [samples.record(shard) is not None for shard in samples.shards()]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [True, True, True]),
        (["sample.batch_size=1", "sample.actors=3", "sample.npz=true", "evaluate.images=5"], [True, True, True]),
        (["sample.precision=fp32", "sample.compile_blocks=true"], [True, True, True]),
        (["sample.precision=bf16"], [False, False, False]),
        (["sample.images=17"], [True, True, False, False, False]),
        (["sample.images=8"], [True, True]),
        (["sample.labels=random"], [False, False, False]),
        (["sample.shard_images=5"], [False, False]),
        (["guidance.scale=2"], [False, False, False]),
        (["solver.rtol=0.01"], [False, False, False]),
        (["seed=8"], [False, False, False]),
    ],
)
def test_what_makes_an_image_makes_it_again(made, overrides, expected):
    assert done(made, *overrides) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sampler_has_the_precision_of_its_configuration(made, precision):
    assert Sampler.load(SamplingInputs.at(made, [f"sample.precision={precision}"])).precision == precision


def test_other_models_make_all_again(made, tmp_path):
    run = trained_run(tmp_path)
    for path in Run.at(made).storage.list("samples"):
        run.storage.write_bytes(path, Run.at(made).storage.read_bytes(path))
    assert done(run.storage.url()) == [True, True, True]
    path = f"{run.prefix('train_lightningdit')}/artefact.json"
    run.storage.write_json(path, {**run.storage.read_json(path), "digest": DIGEST})
    assert done(run.storage.url()) == [False, False, False]


def test_a_label_that_is_no_class_is_one_line(made):
    with pytest.raises(UserError, match=r"^sample\.labels: 'x' is none of the 3 classes"):
        SampleSet.of(SamplingInputs.at(made, ["sample.labels=[x]"]))


def test_a_run_without_latents_says_what_to_do(tmp_path):
    run = trained_run(tmp_path)
    run.storage.delete(run.prefix("precompute_latents"))
    with pytest.raises(UserError, match=r"no latents yet; run python -m ray_jobs\.precompute_latents"):
        SamplingInputs.of(run)


@pytest.fixture
def weak(made):
    """The export of the run itself, as the weaker model of its samples."""
    return Run.at(made).folder("train_lightningdit").url()


def test_a_model_that_guides_itself_changes_no_bit(made, weak):
    plain, guided = (
        Sampler.load(inputs).images(range(3), [0, 1, 2], 7, inputs.config.guidance, inputs.config.solver)
        for inputs in (
            SamplingInputs.at(made),
            SamplingInputs.at(made, [f"guidance.weak.model={weak}", "guidance.weak.scale=2"]),
        )
    )
    assert guided.equal(plain)


def test_another_weak_model_makes_the_samples_again(made, tmp_path):
    other = trained_run(tmp_path)
    folder = other.folder("train_lightningdit")
    override = [f"guidance.weak.model={folder.url()}", "guidance.weak.scale=2"]
    before = SamplingInputs.at(made, override)
    record = folder.read_json("artefact.json")
    folder.write_json("artefact.json", {**record, "digest": DIGEST})
    assert SamplingInputs.at(made, override).origin != before.origin
    assert done(made, *override) == [False, False, False]


def test_a_weak_model_that_cannot_guide_is_one_line(made, tmp_path):
    other = trained_run(tmp_path)
    folder = other.folder("train_lightningdit")
    record = folder.read_json("artefact.json")
    folder.write_json("artefact.json", {**record, "inputs": {**record["inputs"], "precompute_latents": "d" * 64}})
    for model, message in (
        (folder.url(), r"was trained on latents dddddddddddd, but this run on bbbbbbbbbbbb"),
        (f"{made}/tokenizer/export", r"no whole export of a LightningDiT there"),
        (str(tmp_path / "nothing"), r"no whole export of a LightningDiT there"),
    ):
        with pytest.raises(UserError, match=message):
            SamplingInputs.at(made, [f"guidance.weak.model={model}", "guidance.weak.scale=2"])


def save_checkpoints(run, factors):
    """Save checkpoints of the run's training, each with its weights by a factor as their average."""
    fresh = TrainState(images_seen=0, config="c", data="d")
    checkpoints = Checkpoints(run.training_folder("train_lightningdit"), fresh, Retention(len(factors)), World())
    for images_seen, factor in factors.items():
        state = small_models.lightningdit().state_dict()
        shards = {f"model.{name}": as_full_shard(tensor * factor) for name, tensor in state.items()}
        step = SimpleNamespace(engines={}, ema=SimpleNamespace(tensor_shards=shards), averages={}, state_dict=dict)
        checkpoints.save(step, fresh.after(images_seen), {}, no_log)
    checkpoints.wait_for_pending_save()


def test_an_earlier_checkpoint_of_the_run_guides(tmp_path):
    run = trained_run(tmp_path)
    save_checkpoints(run, {4: 0.5, 8: 1.0})
    plain, early, itself = (
        SamplingInputs.at(run.storage.url(), overrides)
        for overrides in (
            [],
            ["guidance.weak={checkpoint_images: 4, scale: 2}"],
            ["guidance.weak={checkpoint_images: 8, scale: 2}"],
        )
    )
    images = [
        Sampler.load(inputs).images(range(3), [0, 1, 2], 7, inputs.config.guidance, inputs.config.solver)
        for inputs in (plain, early, itself)
    ]
    assert images[2].equal(images[0])
    assert not images[1].equal(images[0])
    weak = early.config.guidance.weak
    assert weak.summary == "autoguidance 2 by its checkpoint of 4 images for t in [0, 1]"
    assert early.output.draft.inputs["weak_model"] == early.weak.digest != itself.weak.digest
    save_checkpoints(run, {4: 0.25})
    again = SamplingInputs.at(run.storage.url(), ["guidance.weak={checkpoint_images: 4, scale: 2}"])
    assert again.origin != early.origin, "made again"


def test_an_evaluated_checkpoint_is_not_guided_by_one_that_may_come_later(tmp_path):
    run = trained_run(tmp_path)
    overrides = ["guidance.weak={checkpoint_images: 4, scale: 2}", "guidance.scale=3"]
    inputs = CheckpointEvaluationInputs.of(Run.at(run.storage.url(), overrides))
    assert inputs.weak is None
    assert inputs.evaluation.config.guidance.summary == "guidance 3 for t in [0, 1]"


def test_a_checkpoint_that_is_gone_is_one_line(tmp_path):
    run = trained_run(tmp_path)
    override = "guidance.weak={checkpoint_images: 4, scale: 2}"
    message = r"checkpoint_images=4: no such checkpoint in .*/checkpoints; there are: %s; a training keeps those of "
    with pytest.raises(UserError, match=message % "none"):
        SamplingInputs.at(run.storage.url(), [override])
    save_checkpoints(run, {8: 1, 16: 1})
    with pytest.raises(UserError, match=message % "8, 16" + r"train_lightningdit\.keep_images"):
        SamplingInputs.at(run.storage.url(), [override])
