"""Requests to a store: a decision reads each record once, ranks ask through rank 0, and many shards are listed."""

import pickle
from pathlib import Path

import pytest
from support import many_shards
from support.counting_store import CountingStore, by_kind, counted

from vavae.data.shards.write import finish
from vavae.errors import CommonError, UserError
from vavae.runs.evaluation_inputs import EvaluationInputs, ReportInputs
from vavae.runs.extraction_inputs import ExtractionInputs
from vavae.runs.jobs import JOBS, TRAININGS
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.runs.training_inputs import (
    LightningDiTTrainingInputs,
    TokenizerTrainingInputs,
    resolve_once,
)
from vavae.storage.artifact import RECORD
from vavae.storage.retry import StorageUnavailableError

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
PAGE = 10
FEW, MANY = 4, 44
DECISIONS = {
    "plans": lambda run: run.plans(),
    **{f"plan of {job}": lambda run, job=job: run.plan(job) for job in JOBS},
    **{f"output of {job}": lambda run, job=job: run.output(job) for job in JOBS},
    **{f"claim of {job}": lambda run, job=job: run.claim(job) for job in TRAININGS},
    **{f"training folder of {job}": lambda run, job=job: run.training_folder(job) for job in TRAININGS},
    **{
        inputs.__name__: inputs.of
        for inputs in (
            TokenizerTrainingInputs,
            ExtractionInputs,
            LightningDiTTrainingInputs,
            SamplingInputs,
            EvaluationInputs,
            ReportInputs,
        )
    },
}


@pytest.fixture(autouse=True)
def _pages(monkeypatch):
    monkeypatch.setattr(CountingStore, "page", PAGE)


def run_at(folder, shards):
    return many_shards.make_run(TINY, f"counting://{folder}/{shards}", shards, f"storage.cache={folder}/cache")


def pages(names):
    return -(-names // PAGE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by their number of shards."""
    folder = tmp_path_factory.mktemp("runs")
    return {shards: many_shards.finished(run_at(folder, shards), shards) for shards in (FEW, MANY)}


@pytest.mark.parametrize("shards", [FEW, MANY])
def test_what_many_processes_have_written_is_checked_by_one_listing(tmp_path, shards):
    run = run_at(tmp_path, shards)
    plan, written = many_shards.written_shards(run, shards)
    manifest, requests = counted(lambda: finish(run.storage, "shards", plan, written))
    assert len(manifest.splits["train"]) == shards
    # The manifest is put, read back for its checksum, and committed.
    assert by_kind(requests) == {"get": 1, "list": pages(2 * shards + 1), "put": 2}
    many_shards.commit_tokenizer(run)
    extraction, inputs, encoded = many_shards.written_latents(run)
    found, requests = counted(lambda: extraction.finish(inputs.config.latent_shape, encoded))
    assert by_kind(requests) == {"get": 1, "list": pages(2 * shards), "put": 2}
    inputs.output.commit(*found)
    many_shards.commit_lightningdit(run)
    samples, _, generated = many_shards.written_samples(run)
    files, requests = counted(lambda: samples.files(generated))
    assert len(files) == shards
    assert by_kind(requests) == {"list": pages(2 * shards)}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_decision_reads_each_record_once_whatever_the_number_of_shards(runs, name):
    counts = {}
    for shards, run in runs.items():
        _, requests = counted(lambda run=run: DECISIONS[name](run))
        again = [request for request, count in requests.items() if request.kind == "get" and count > 1]
        assert again == []
        records = sum(request.path.endswith(RECORD) for request in requests)
        assert records <= len(JOBS)
        counts[shards] = by_kind(requests)
        assert counts[shards].pop("list", 0) <= 3 * pages(2 * shards + 5) + 3, "three sets, and what has no shards"
    assert counts[FEW] == counts[MANY]


@pytest.mark.parametrize(
    "inputs", [TokenizerTrainingInputs, ExtractionInputs, LightningDiTTrainingInputs, SamplingInputs, EvaluationInputs]
)
def test_inputs_are_small_to_hand_to_ranks_and_actors(runs, inputs):
    few, many = (len(pickle.dumps(inputs.of(run))) for run in runs.values())
    assert (many - few) / (MANY - FEW) < 100, "bytes for each further shard: less than a path, its size and checksum"


@pytest.mark.gloo
@pytest.mark.parametrize("job", TRAININGS)
def test_a_rank_asks_for_nothing_before_its_first_micro_batch(gloo, runs, job):
    counts = {}
    for shards, run in runs.items():
        root = run.storage.url().rpartition("/")[0]
        counts[shards], *others = gloo.run(3, many_shards.requests_of_rank, TINY, root, shards, job, PAGE)
        assert others == [{}, {}]
    more = pages(2 * MANY + 5) - pages(2 * FEW + 5)
    assert 0 < counts[MANY].pop("list") - counts[FEW].pop("list") <= more
    assert counts[FEW] == counts[MANY]
    assert sum(counts[FEW].values()) < 16


def resolve_badly(world, error):
    def resolve():
        raise error

    with pytest.raises((UserError, StorageUnavailableError)) as caught:
        resolve_once(world, resolve)
    return type(caught.value), str(caught.value)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("error", "kind"),
    [(UserError("no shards"), CommonError), (StorageUnavailableError("gone"), StorageUnavailableError)],
)
def test_an_error_of_rank_0_is_that_of_every_rank(gloo, error, kind):
    assert gloo.run(2, resolve_badly, error) == [(kind, str(error))] * 2
