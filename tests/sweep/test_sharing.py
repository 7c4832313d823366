"""What trials share is made once: the tokenizer up to the last phase, of which four trials branch, without Ray."""

from pathlib import Path

import pytest

from vavae.config import load
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.evaluation.evaluate import evaluate_tokenizer
from vavae.runs.config import RunConfig
from vavae.runs.evaluation_inputs import EvaluationInputs
from vavae.runs.jobs import Job
from vavae.runs.run import Run
from vavae.runs.training_inputs import begin_training
from vavae.storage.artifact import read
from vavae.sweep.branch import prefix_of
from vavae.sweep.config import TOKENIZER_METRICS
from vavae.sweep.sharing import Sharing, content_key, link_artifact
from vavae.sweep.sweep import Sweep
from vavae.training.logging.log import read_rows
from vavae.training.session import LocalSession
from vavae.training.train import train

_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
_BATCH = 8
_BOUNDARY, _BUDGET = 2 * _BATCH, 3 * _BATCH
_FIELDS = [
    "train_vavae.engine.backend=torch",
    f"train_vavae.images={_BUDGET}",
    "train_vavae.ema_decay=0.5",
    f"train_vavae.batch_size={_BATCH}",
    f"train_vavae.log_images={_BATCH}",
    "train_vavae.keep_checkpoints=1",
    f"losses.adversarial.start_images={_BATCH}",
    "train_vavae.stages=[{losses: {vision_foundation: {weight: 0.5}}},"
    f" {{from_images: {_BOUNDARY}, losses: {{vision_foundation: {{weight: 0.1}}}}}}]",
]
_MARGINS = (0.0, 0.99, 1.0, 1.01)


def _config(root: Path, *overrides: str) -> RunConfig:
    return load(RunConfig, _CONFIG, [f"storage.root={root}", *_FIELDS, *overrides])


def _with_margin(root: Path, margin: float) -> RunConfig:
    return _config(root, f"train_vavae.stages.1.losses.vision_foundation.cos_margin={margin}")


class InProcess:
    """Runs the jobs that are requested in this process, and remembers their order."""

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing
        self.made: list[str] = []

    def request(self, config: RunConfig, job: Job) -> Run:
        return self.sharing.make(
            config, job, {"prepare_shards": self._shard, "train_vavae": self._train}[job], self.request
        )

    def _shard(self, run: Run) -> None:
        self.made.append(run.config.name)
        write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, lambda *_: None)

    def _train(self, run: Run) -> None:
        self.made.append(run.config.name)
        train(begin_training(run, "train_vavae", World()), LocalSession(), World())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    """The tokenizers of four margins are made."""
    root = tmp_path_factory.mktemp("sweep")
    shared = InProcess(Sharing(str(root), phases=(1,)))
    for margin in _MARGINS:
        shared.request(_with_margin(root, margin), "train_vavae")
    return shared


@pytest.fixture(scope="module")
def branches(shared: InProcess) -> list[Run]:
    return [shared.request(_with_margin(Path(shared.sharing.root), margin), "train_vavae") for margin in _MARGINS]


@pytest.mark.jobs
def test_four_margins_are_four_short_branches_of_one_tokenizer(shared: InProcess, branches: list[Run]) -> None:
    records = {}
    for folder in sorted(Path(shared.sharing.root).iterdir()):
        run = Run(load(RunConfig, folder / "config.yaml"))
        if (record := run.artifact("train_vavae")) is not None:
            records[folder.name] = record
    assert sorted(record.images_seen for record in records.values()) == [_BOUNDARY, *[_BUDGET] * len(_MARGINS)]
    assert len({record.digest for record in records.values()}) == len(records), "each is another tokenizer"
    assert len(shared.made) == 1 + len(records), "shards once, the prefix once, every branch once"
    (prefix,) = (name for name, record in records.items() if record.images_seen == _BOUNDARY)
    for run in branches:
        log = run.storage.child(f"{run.training_prefix('train_vavae')}/log")
        owned = [Path(log.url(name)).stat().st_nlink for name in log.list()]
        assert owned == [1 + len(_MARGINS), 1], "up to the boundary its log is the prefix's, then its own"
        assert [row["images"] for row in read_rows(log)] == [_BATCH, 2 * _BATCH, 3 * _BATCH]
    assert prefix not in [run.config.name for run in branches]


@pytest.mark.jobs
def test_a_branch_is_the_tokenizer_that_a_whole_training_makes(
    shared: InProcess, branches: list[Run], tmp_path: Path
) -> None:
    whole = InProcess(Sharing(str(tmp_path))).request(_with_margin(tmp_path, _MARGINS[2]), "train_vavae")
    assert whole.require("train_vavae") == branches[2].require("train_vavae")


@pytest.mark.jobs
def test_what_is_made_is_not_made_again(shared: InProcess, branches: list[Run]) -> None:
    before = list(shared.made)
    for margin in _MARGINS:
        shared.request(_with_margin(Path(shared.sharing.root), margin), "train_vavae")
    assert shared.made == before


@pytest.mark.jobs
def test_a_linked_tokenizer_is_the_runs_own(shared: InProcess, branches: list[Run]) -> None:
    config = _with_margin(Path(shared.sharing.root), _MARGINS[0]).model_copy(update={"name": "other"})
    other = Run(config)
    link_artifact(shared.request(config, "prepare_shards"), other, "prepare_shards")
    link_artifact(branches[0], other, "train_vavae")
    plans = other.plans()
    assert [plans[job].done for job in ("prepare_shards", "train_vavae", "precompute_latents")] == [True, True, False]
    assert read(other.storage, other.prefix("train_vavae")) == branches[0].require("train_vavae")
    with pytest.raises(UserError, match="its tokenizer is another than this sweep makes now"):
        link_artifact(branches[1], other, "train_vavae")


@pytest.mark.jobs
def test_a_tokenizer_is_evaluated_before_there_are_latents(branches: list[Run]) -> None:
    seen: list[int] = []
    metrics = {metric.name: metric for metric in evaluate_tokenizer(EvaluationInputs.of(branches[0]), seen.append)}
    assert metrics.keys() <= TOKENIZER_METRICS.keys()
    assert all(TOKENIZER_METRICS[name] == metric.better for name, metric in metrics.items())
    assert metrics["psnr"].value > 0
    assert metrics["reconstruction_frechet_distance"].value > 0
    assert sum(seen) == 2 * branches[0].config.evaluate.images, "the images and their reconstructions"


def test_keys_name_what_decides_and_nothing_else(tmp_path: Path) -> None:
    base = _config(tmp_path)

    def changed(job: Job, *overrides: str) -> bool:
        return content_key(_config(tmp_path, *overrides), job) != content_key(base, job)

    assert not changed("precompute_latents", "lightningdit.depth=3", "workers.count=2", "name=other")
    assert changed("precompute_latents", "losses.kl_weight=1")
    assert not changed("prepare_shards", "losses.kl_weight=1")
    assert changed("train_vavae", "train_vavae.images=64")
    assert changed("train_vavae", "shards.source=elsewhere.zip")
    assert changed("precompute_latents", "latents.flip=false")
    assert not changed("train_vavae", "latents.flip=false")
    assert not changed("train_lightningdit", "train_lightningdit.keep_checkpoints=3")
    assert changed("train_lightningdit", "train_lightningdit.keep_images=[64]"), "it may guide"


def test_a_prefix_ends_where_its_phase_begins_and_needs_the_same_adversary(tmp_path: Path) -> None:
    config = _config(tmp_path)
    prefix = prefix_of(config, 1)
    assert prefix is not None
    assert (prefix.train_vavae.images, len(prefix.train_vavae.stages)) == (_BOUNDARY, 1)
    assert prefix_of(config, 0) is None, "nothing comes before the first phase"
    assert prefix_of(config, 2) is None, "there is no such phase"
    assert prefix_of(_config(tmp_path, f"train_vavae.images={_BOUNDARY}"), 1) is None, "its phase is never reached"
    late = ["losses.adversarial.weight=0", "train_vavae.stages.1.losses.adversarial.weight=0.1"]
    assert prefix_of(_config(tmp_path, *late), 1) is None, "the adversary's weights are drawn before the first step"


def test_the_phases_that_a_sweep_varies_are_read_from_its_keys(tmp_path: Path) -> None:
    stages = "[{}, {from_images: 16}, {from_images: 32}]"
    domains = (
        "{train_vavae.stages.2.losses: {grid: [{kl_weight: 0}]}, tokenizer.latent_dim: {grid: [4]}, "
        "train_vavae.stages.1.from_images: {grid: [16]}}"
    )
    path = tmp_path / "sweep.yaml"
    path.write_text(f"name: a\nbase: {_CONFIG}\nrun: {{train_vavae: {{stages: {stages}}}}}\nsweep: {domains}\n")
    assert Sharing.of(Sweep.load(path)).phases == (1, 2)


@pytest.mark.parametrize(
    ("key", "rest", "shared"),
    [
        ("guidance.scale", "", True),
        ("lightningdit.depth", "", False),
        ("guidance.scale", "rungs: [64]", False),
        ("guidance.scale", "run: {train_lightningdit: {measure: {every_images: 64}}}", False),
    ],
)
def test_trials_that_differ_after_training_share_lightningdits(
    tmp_path: Path, key: str, rest: str, shared: bool
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"name: a\nbase: {_CONFIG}\nsweep: {{{key}: {{grid: [1, 2]}}}}\n{rest}\n")
    assert ("train_lightningdit" in Sharing.of(Sweep.load(path)).jobs) == shared
