"""Plan of a run: what is done and what is still to do, from storage alone."""

import re
from uuid import uuid4

import numpy as np
import pytest
import yaml
from PIL import Image

from ray_jobs.runtime.preflight import preflight
from vavae.config import added, digest, load
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.jobs import JOBS, TRAININGS
from vavae.runs.run import Run
from vavae.runs.training_config import TokenizerTrainingConfig
from vavae.runs.training_inputs import begin_training
from vavae.storage.artifact import FileInfo, commit

JOBS = list(JOBS)
SHARDS, TOKENIZER, LATENTS, LIGHTNINGDIT, SAMPLES, MEASURES = JOBS


@pytest.fixture
def make(tmp_path):
    """Make the run of a configuration with some keys changed."""
    for name in ("cat", "dog"):
        for index in range(3):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (80 * index, 0, 0)).save(tmp_path / "images" / name / f"{index}.png")
    training = {"images": 100, "batch_size": 8}
    document = {
        "name": "tiny",
        "storage": {"root": f"memory://{uuid4()}", "cache": str(tmp_path / "cache")},
        "shards": {"source": str(tmp_path / "images"), "image_size": 8, "validation_fraction": 0},
        "stream": {"lanes": 2},
        "tokenizer": {"channels": 32, "channel_multipliers": [1, 1], "attention_levels": []},
        "lightningdit": {"size": None, "depth": 1, "width": 32, "heads": 2},
        "train_vavae": training,
        "train_lightningdit": training,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    return lambda *overrides: Run(load(RunConfig, tmp_path / "run.yaml", overrides))


def do(run, job):
    """Leave behind what a job leaves behind."""
    if job == SHARDS:
        write_shards(run.storage, run.prefix(job), run.config.shards, lambda done, total: None)
        return
    if job in TRAININGS:
        run.claim(job)
    content = digest({"identity": run.identity(job), "inputs": run.inputs(job), "images": run.budget(job)})
    run.storage.write_bytes(f"{run.prefix(job)}/made", content.encode())
    beside = {}
    if job == SAMPLES:
        run.storage.write_bytes("samples.png", b"picture")
        beside = {"beside": {"samples.png": len(b"picture")}}
    files = {"made": FileInfo(bytes=len(content), sha256="")}
    run.output(job).commit(content, files, images_seen=run.budget(job), **beside)


@pytest.fixture
def done(make):
    """A finished run."""
    run = make()
    for job in JOBS:
        do(run, job)
    return run


def to_do(run):
    return {job: plan.why for job, plan in run.plans().items() if not plan.done}


def test_a_fresh_run_has_everything_to_do(make):
    assert to_do(make()) == {
        SHARDS: "not there yet",
        TOKENIZER: "after image shards",
        LATENTS: "after tokenizer",
        LIGHTNINGDIT: "after latents",
        SAMPLES: "after LightningDiT",
        MEASURES: "after samples",
    }


def test_every_job_makes_the_next_one_possible(make):
    run = make()
    for number, job in enumerate(JOBS):
        assert list(to_do(run)) == JOBS[number:]
        assert to_do(run)[job] == "not there yet"
        with pytest.raises(UserError, match=rf"run python -m ray_jobs.{job} with this configuration first"):
            run.require(job)
        do(run, job)
    assert to_do(run) == {}


def test_a_training_that_was_stopped_resumes(make):
    run = make()
    do(run, SHARDS)
    checkpoints, record = run.training_folder(TOKENIZER).child("checkpoints"), run.require(SHARDS)
    checkpoints.write_bytes("lease.json", b"")
    checkpoints.write_bytes("000000000032/unfinished", b"")
    assert to_do(run)[TOKENIZER] == "not there yet"
    for images_seen in ("000000000032", "000000000064"):
        commit(checkpoints, images_seen, record)
    assert to_do(run)[TOKENIZER] == "resumes at 64 of 104 images"


def test_storage_is_reached_as_the_configuration_says(make):
    options = make("storage.profile=lab", "storage.anonymous=true", "storage.attempts=3").storage.options
    assert (options.profile, options.anonymous, options.attempts) == ("lab", True, 3)


def test_an_array_that_is_asked_for_later_is_made_of_the_samples_that_are_there(done, make):
    other = make("sample.npz=true", f"storage.root={done.config.storage.root}")
    assert to_do(other) == {SAMPLES: "without samples.npz", MEASURES: "after samples"}
    other.storage.write_bytes("samples.npz", b"")
    assert to_do(other) == {}


def test_a_label_that_is_no_class_is_refused_before_anything_starts(make):
    run = make("sample.labels=[cat, lion]")
    assert preflight(run, [SAMPLES]) == []  # without images the classes are not known
    do(run, SHARDS)
    with pytest.raises(UserError, match=r"sample\.labels: 'lion' is none of the 2 classes"):
        preflight(run, [SAMPLES])


def test_guidance_by_a_checkpoint_that_would_not_be_kept_is_refused_before_anything_starts(make):
    weak = "guidance.weak={checkpoint_images: 64, scale: 2}"
    message = r"checkpoint_images=64: the training is to come, .* where train_lightningdit\.keep_images=\[\] names it"
    with pytest.raises(UserError, match=message):
        make(weak).plans()
    assert not make(weak, "train_lightningdit.keep_images=[64]").plans()["sample"].done


def test_a_class_token_of_another_width_than_the_teacher_gives_is_refused_before_anything_starts(make):
    stored = "latents.features={teacher: {name: efficientnet_lite0}, class_token: true}"
    for jobs in (["precompute_latents"], ["train_lightningdit"]):
        with pytest.raises(UserError, match=r"class_token\.width=768, but efficientnet_lite0 gives 112: set it so$"):
            preflight(make(stored, "lightningdit.class_token={}"), jobs)


def test_a_reference_that_is_none_is_refused_before_anything_starts(make, tmp_path):
    run = make(f"evaluate.reference={tmp_path / 'some.npz'}", "shards.validation_fraction=0.5")
    mean = np.zeros(1280)
    np.savez(tmp_path / "some.npz", mu=mean, sigma=np.eye(1280))
    before = preflight(run, [MEASURES])
    mean[7] = np.nan
    np.savez(tmp_path / "some.npz", mu=mean, sigma=np.eye(1280))
    with pytest.raises(UserError, match=r"some.npz: mu\[7\] is nan: these are no moments; make the file again$"):
        preflight(run, [MEASURES])
    assert before == preflight(make("shards.validation_fraction=0.5"), [MEASURES])


def test_planning_writes_nothing(done):
    before = done.storage.sizes()
    done.plans()
    assert done.storage.sizes() == before


def test_what_is_done_shows_its_digest(done):
    for job, plan in done.plans().items():
        assert plan.done
        assert done.require(job).digest.startswith(plan.why)
        assert len(plan.why) == 12
        assert done.plan(job) == plan


@pytest.mark.parametrize(
    ("override", "job", "culprit"),
    [
        ("shards.image_size=16", TOKENIZER, SHARDS),
        ("guidance.scale=3", MEASURES, SAMPLES),
        ("latents.flip=false", LIGHTNINGDIT, LATENTS),
    ],
)
def test_a_job_refuses_inputs_of_another_configuration(done, make, override, job, culprit):
    other = make(override, f"storage.root={done.config.storage.root}")
    with pytest.raises(UserError, match=rf"another configuration; run python -m ray_jobs.{culprit} with this one"):
        other.plan(job)


@pytest.mark.parametrize(
    ("overrides", "stale"),
    [
        (["workers.count=2", "sample.batch_size=1", "train_vavae.log_images=5", "stream.workers=3"], {}),
        (["train_vavae.images=90"], {}),
        (["evaluate.images=7"], {MEASURES: "made with another configuration"}),
        (
            ["solver.num_steps=9"],
            {SAMPLES: "made with another configuration", MEASURES: "after samples"},
        ),
        (
            ["latents.flip=false"],
            {
                LATENTS: "made with another configuration",
                LIGHTNINGDIT: "after latents",
                SAMPLES: "after LightningDiT",
                MEASURES: "after samples",
            },
        ),
        (
            ["train_lightningdit.images=105"],
            {LIGHTNINGDIT: "104 of 112 images seen", SAMPLES: "after LightningDiT", MEASURES: "after samples"},
        ),
        (
            ["train_vavae.images=200"],
            {
                TOKENIZER: "104 of 200 images seen",
                LATENTS: "after tokenizer",
                LIGHTNINGDIT: "after latents",
                SAMPLES: "after LightningDiT",
                MEASURES: "after samples",
            },
        ),
    ],
)
def test_a_changed_field_makes_stale_what_depends_on_it(done, make, overrides, stale):
    assert to_do(make(*overrides)) == stale


def test_another_input_makes_stale_what_was_made_from_it(done, make):
    longer, before = make("train_vavae.images=200"), done.training_prefix(LIGHTNINGDIT)
    do(longer, TOKENIZER)
    assert to_do(longer)[LATENTS] == "not there yet", "they lie under the digest of their tokenizer"
    do(longer, LATENTS)
    assert to_do(longer) == {
        LIGHTNINGDIT: "made from other inputs",
        SAMPLES: "after LightningDiT",
        MEASURES: "after samples",
    }
    assert longer.training_prefix(LIGHTNINGDIT) != before
    for job in (LIGHTNINGDIT, SAMPLES):
        do(longer, job)
    assert to_do(longer) == {MEASURES: "made from other inputs"}


@pytest.mark.parametrize(
    ("job", "override", "message"),
    [
        (
            TOKENIZER,
            "train_vavae.batch_size=4",
            r"^train_vavae.batch_size is 4, but the tokenizer in .*tiny was begun with 8",
        ),
        (TOKENIZER, "losses.kl_weight=1", r"^losses.kl_weight is 1.0, but the tokenizer"),
        (LIGHTNINGDIT, "objective.label_dropout=0.5", r"^objective.label_dropout is 0.5, but the LightningDiT"),
        (LIGHTNINGDIT, "train_lightningdit.ema_decay=null", r"ema_decay is None, but .* begun with 0.9999"),
        (LIGHTNINGDIT, "train_lightningdit.ema_ramp=0.09", r"ema_ramp is 0.09, but .* begun with None"),
        (TOKENIZER, "seed=1", r"^seed is 1, but the tokenizer"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_training_does_not_resume_under_another_configuration(make, job, override, message, finished):
    run, other = make(), make(override)
    for before in JOBS[: JOBS.index(job)]:
        do(run, before)
    if finished:
        do(run, job)
    else:
        run.claim(job)
    for refused in (lambda: other.plan(job), other.plans, lambda: other.claim(job)):
        with pytest.raises(UserError, match=message) as caught:
            refused()
        assert re.search("set it back or give the run another name$", str(caught.value))
    run.claim(job)
    assert run.plan(job).done == finished


@pytest.mark.parametrize("job", TRAININGS)
def test_a_training_is_claimed_before_it_begins(make, job):
    run, other = make(), make(f"{job}.batch_size=4")
    for before in JOBS[: JOBS.index(job)]:
        do(run, before)
    claim = f"{run.training_prefix(job)}/configuration.json"
    inputs = begin_training(run, job, World())
    assert run.storage.read_json(claim) == run.identity(job)
    assert (inputs.config_digest, inputs.data_digest) == (digest(run.identity(job)), digest(run.inputs(job)))
    with pytest.raises(UserError, match="set it back"):
        begin_training(other, job, World())


def test_shards_of_another_configuration_are_refused(done, make):
    with pytest.raises(UserError, match=r"shards made with image_size=8, not 16"):
        make("shards.image_size=16").plans()


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("damage", ["record", "file", "size"])
def test_a_deleted_artifact_is_to_do(done, job, damage):
    folder = done.prefix(job)
    file = next(path for path in done.storage.list(folder, recursive=True) if path.endswith((".tar", "made")))
    if damage == "record":
        done.storage.delete(f"{folder}/artefact.json")
    elif damage == "file":
        done.storage.delete(file)
    else:
        done.storage.write_bytes(file, b"short")
    assert to_do(done)[job] == "not there yet"
    assert not done.plan(job).done
    assert all(why.startswith("after") for name, why in to_do(done).items() if name != job)
    do(done, job)
    assert to_do(done) == {}, "the same work gives the same digest: nothing after it is stale"


def test_files_beside_belong_to_the_artifact(done):
    done.storage.delete("samples.png")
    assert list(to_do(done)) == [SAMPLES, MEASURES]


def test_a_job_needs_its_inputs(make):
    run = make()
    with pytest.raises(UserError, match=r"tiny: no image shards yet; run python -m ray_jobs.prepare_shards"):
        run.plan(TOKENIZER)
    do(run, SHARDS)
    with pytest.raises(UserError, match=r"no tokenizer yet; run python -m ray_jobs.train_vavae"):
        run.plan(LATENTS)


def test_the_record_names_what_went_in(done):
    record = done.require(SAMPLES)
    assert record.inputs == {name: done.require(name).digest for name in (TOKENIZER, LATENTS, LIGHTNINGDIT)}
    assert record.config == digest(done.identity(SAMPLES))
    assert record.details["identity"] == done.identity(SAMPLES)
    assert record.kind == "samples"
    assert (done.require(TOKENIZER).images_seen, record.images_seen) == (104, None)


def test_budgets_are_full_steps(make):
    run = make()
    assert {job: run.budget(job) for job in JOBS if run.budget(job)} == {TOKENIZER: 104, LIGHTNINGDIT: 104}


class LaterTraining(TokenizerTrainingConfig):
    blur: float | None = added(0.0)


class LaterRunConfig(RunConfig):
    train_vavae: LaterTraining


@pytest.mark.parametrize("blur", [0.5, None])
def test_a_field_that_came_after_a_run_was_begun_is_refused_away_from_its_neutral_value_alone(done, blur):
    document = done.config.model_dump()
    assert to_do(Run(LaterRunConfig.model_validate(document))) == {}
    document["train_vavae"]["blur"] = blur
    message = rf"train_vavae\.blur is {blur}, but the tokenizer in \S+ was begun with 0\.0; set it back or give"
    with pytest.raises(UserError, match=message):
        Run(LaterRunConfig.model_validate(document)).plans()
