"""The samples of a run: what they are made of, and what makes them again."""

import pytest
from support.trained_run import DIGEST, trained_run

from vavae.errors import UserError
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.sample_shards import SampleSet
from vavae.sampling.sampler import Sampler


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
