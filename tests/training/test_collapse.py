"""Trainings that collapse while all their numbers stay finite."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gloo import GlooLauncher
from support.toy_training import ToyStep, train_toy
from support.training_steps import BATCH, JOBS, build_step, tiny_config
from torch import Tensor

from vavae.data.image_stream import MicroBatchKey
from vavae.distributed.world import World
from vavae.runs.events import Event
from vavae.runs.jobs import Job
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.collapse import PATIENT_ROWS, UNJUDGED_ROWS, WARNING_ROWS, Collapse, CollapseDetector, CollapseError
from vavae.training.logging.log import MetricsLog, read_rows
from vavae.training.session import LocalSession
from vavae.training.step import Step, variances
from vavae.training.trainer import Trainer

ALONE = World()
LIMIT = 3
ROWS = UNJUDGED_ROWS + LIMIT + 3


def collapses(values: list[float], name: str = "gradient_norm/toy") -> list[Collapse]:
    """Collapses that are seen in rows of one image each."""
    detector = CollapseDetector(after_images=0)
    return [found for at, value in enumerate(values, 1) for found in detector.add(at, {name: value, "loss": 0.0})]


def test_a_gradient_far_below_its_median_is_a_collapse() -> None:
    before = [float(value) for value in range(2, 2 + UNJUDGED_ROWS)]  # of median 6.5
    assert collapses([*before, 6.6e-3, 6.6e-3, 6.6e-3, 6.6e-3]) == []
    found = collapses([*before, 6.4e-3, 6.4e-3, 6.3e-3])
    assert [(each.since_images, each.rows) for each in found] == [(11, 1), (11, 2), (11, 3)]
    assert str(found[-1]) == (
        "gradient_norm/toy is 0.0063, below 0.001 of its running median 6.5, for 3 rows of the log, from 11 images on"
    )


def test_the_median_follows_a_gradient_that_shrinks_slowly() -> None:
    assert collapses([0.95**row for row in range(400)]) == []


def test_rows_of_a_collapse_leave_the_median_as_it_was() -> None:
    assert [found.rows for found in collapses([1.0] * 20 + [1e-6] * 300)] == [*range(1, 301)]


@pytest.mark.parametrize(
    ("name", "fine", "collapsed", "figure"),
    [
        ("output_variance", 1.1e-4, 0.9e-4, "9e-05 of the data's, below 0.0001"),
        ("discriminator_accuracy", 0.99, 0.991, "99.10%, above 99%"),
    ],
)
def test_limits_of_outputs_and_discriminator(name: str, fine: float, collapsed: float, figure: str) -> None:
    assert collapses([fine] * 100, name) == []
    found = collapses([0.5] * UNJUDGED_ROWS + [collapsed, collapsed, fine, collapsed], name)
    assert [(each.figure, each.rows) for each in found] == [(figure, 1), (figure, 2), (figure, 1)]


@pytest.mark.parametrize("name", ["output_variance", "discriminator_accuracy", "gradient_norm/toy"])
def test_neither_the_warm_up_nor_the_first_rows_of_a_metric_are_judged(name: str) -> None:
    """Outputs begin at zero, where the last layer does, and a discriminator starts late."""
    extreme = 1.0 if name == "discriminator_accuracy" else 0.0
    unjudged = PATIENT_ROWS if name == "output_variance" else UNJUDGED_ROWS
    detector = CollapseDetector(after_images=100)
    rows = [{name: extreme}] * 100 + [{}] * 50 + [{name: extreme}] * unjudged
    assert [found for at, row in enumerate(rows, 1) for found in detector.add(at, row)] == []
    assert name.startswith("gradient") or detector.add(len(rows) + 1, {name: extreme})


def test_variances_are_between_images() -> None:
    data = torch.randn(8, 3, 4, 4)
    outputs, of_data = variances(data[:1].expand(8, -1, -1, -1), data).tolist()
    assert outputs == 0
    assert of_data == pytest.approx(data.var(0, correction=0).mean().item())
    assert variances(2 * data, data).tolist() == pytest.approx([4 * of_data, of_data])
    assert variances(torch.ones(1, 3, 4, 4), data[:1])[0] == 0 < variances(data[:1], data[:1])[0]
    rounded = variances(data.bfloat16(), data)
    assert rounded.dtype == torch.float64
    assert rounded[0].item() == pytest.approx(of_data, rel=1e-2)


class Recording(LocalSession):
    """Keeps the events."""

    def __init__(self, stop_at_step: int | None = None) -> None:
        super().__init__()
        self.recorded: list[Event] = []
        self._stop_at, self._steps = stop_at_step, 0

    def event(self, event: Event) -> None:
        self.recorded.append(event)

    def stop_requested(self) -> bool:
        self._steps += 1
        return self._steps == self._stop_at

    @property
    def collapses(self) -> list[tuple[int | None, Any]]:
        """Images seen at each collapse, and its metric."""
        return [(event.images, event.details["metric"]) for event in self.recorded if event.event == "collapse"]


def small_gradients(step: Any) -> None:
    """From now on losses say next to nothing to the weights."""
    (engine,) = step.engines.values()
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * 1e-6)


def constant_reconstructions(step: Any) -> None:
    """The decoder's last layer says the same whatever it is given, from now on."""
    layer = step.model.autoencoder.decoder.conv_out
    layer.register_forward_hook(lambda module, inputs, output: 0 * output + 0.3)


def constant_velocities(step: Any) -> None:
    """The LightningDiT's last layer likewise."""
    layer = step.model.model.final_layer.linear
    layer.register_forward_hook(lambda module, inputs, output: 0 * output + 0.3)


def winning_discriminator(step: Any) -> None:
    """The discriminator tells noise, which images are here, from their smooth reconstructions."""
    discriminator = step.engines["discriminator"].module.discriminator

    def margin(module: Any, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        roughness = inputs[0].diff(dim=-1).abs().mean((1, 2, 3), keepdim=True)
        return 1e-3 * logits + 10 * (roughness - 0.5)

    discriminator.register_forward_hook(margin)


def train(
    job: Job,
    storage: Storage,
    inject: Callable[[Step], None],
    session: Recording,
    world: World = ALONE,
    **training: Any,
) -> int:
    """Train with a row for each step, and a collapse in the last rows; images seen at the end."""
    config = tiny_config(images=ROWS * BATCH, log_images=BATCH, checkpoint_images=1_000, **training)
    step = build_step(job, config, world)
    taken, run = 0, step.run

    def run_or_collapse(*arguments: Any, **named: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == UNJUDGED_ROWS + 1:
            inject(step)
        return run(*arguments, **named)

    step.run = run_or_collapse  # type: ignore[method-assign]
    checkpoints = Checkpoints(storage, TrainState(images_seen=0, config="c", data="d"), Retention(2), world, "a test")
    log = MetricsLog(job, storage.child("log"), [], active=world.is_first)
    trainer = Trainer(job, step, getattr(config, job), config.stream, checkpoints, log, session, world)
    return trainer.fit(range(ROWS * BATCH)).images_seen


@pytest.mark.parametrize(
    ("job", "inject", "metric", "remedy"),
    [
        ("train_lightningdit", small_gradients, "gradient_norm/lightningdit", "lower train_lightningdit.optimizer"),
        ("train_vavae", constant_reconstructions, "output_variance", "lower train_vavae.optimizer.learning_rate"),
        ("train_lightningdit", constant_velocities, "output_variance", "lower train_lightningdit.optimizer"),
        ("train_vavae", winning_discriminator, "discriminator_accuracy", "lower losses.adversarial.weight"),
    ],
)
def test_a_collapse_ends_a_training_with_a_checkpoint(
    job: Job,
    inject: Callable[[Step], None],
    metric: str,
    remedy: str,
    storage: Storage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    session, seen = Recording(), (UNJUDGED_ROWS + LIMIT) * BATCH
    with pytest.raises(CollapseError, match=f"^{job} has collapsed: {metric} is .*{remedy}") as caught:
        train(job, storage, inject, session, collapse_limit=LIMIT)
    assert "\n" not in str(caught.value)
    assert session.collapses[0] == (seen, metric)
    assert f"{job} may have collapsed: {metric} is" in caplog.text
    assert session.recorded[-1].event == "checkpoint"
    assert storage.is_file(f"checkpoints/{seen:012d}/artefact.json")
    assert read_rows(storage.child("log"))[-1]["images"] == seen, "the rows that show it are kept"
    again = Recording()
    with pytest.raises(CollapseError, match=metric):
        train(job, storage, inject, again, collapse_limit=LIMIT)
    assert [event.event for event in again.recorded] == ["restored"], "the same command does not go on"
    assert train(job, storage, inject, again, collapse_limit=None) == ROWS * BATCH


@pytest.mark.parametrize("job", JOBS)
def test_a_training_that_is_well_is_left_alone(job: Job, storage: Storage) -> None:
    session = Recording()
    assert train(job, storage, lambda step: None, session, collapse_limit=1) == ROWS * BATCH
    assert session.collapses == []
    rows = read_rows(storage.child("log"))
    assert all(row["output_variance"] > 0 for row in rows[1:])
    assert all((job == "train_vavae") == ("discriminator_accuracy" in row) for row in rows)


def error_of_rank(world: World, folder: Path) -> str:
    with pytest.raises(CollapseError) as caught:
        train("train_vavae", Storage(str(folder)), constant_reconstructions, Recording(), world, collapse_limit=LIMIT)
    return str(caught.value)


@pytest.mark.gloo
def test_all_ranks_stop_at_the_same_row_of_a_collapse(gloo: GlooLauncher, tmp_path: Path) -> None:
    one, other = gloo.run(2, error_of_rank, tmp_path)
    assert one == other
    assert "train_vavae has collapsed: output_variance is" in one
    assert [*gloo.run(3, error_of_rank, tmp_path)] == [one] * 3, "a resume with other workers"


class FadingStep(ToyStep):
    """Its gradients fall to nothing after 20 steps."""

    def __getitem__(self, key: MicroBatchKey) -> Tensor:
        if key.step >= 20:
            self.model.bias.data.zero_()
        return super().__getitem__(key) * (1e-4 if key.step >= 20 else 1)


@pytest.mark.parametrize("stop_at_step", [18, 22, 24])
def test_a_resumed_training_knows_of_the_rows_before(storage: Storage, stop_at_step: int) -> None:
    config = {"images": 400, "log_images": 4, "checkpoint_images": 12, "collapse_limit": 5}
    train_toy(storage, FadingStep(), Recording(stop_at_step), **config)
    session = Recording()
    with pytest.raises(CollapseError, match=r"for 5 rows of the log, from 84 images on"):
        train_toy(storage, FadingStep(), session, **config)
    assert session.collapses == [(100, "gradient_norm/toy")]


@pytest.mark.parametrize(("limit", "seen"), [(None, 400), (30, (20 + 30) * 4)])
def test_it_warns_once_before_a_late_limit_or_none(
    storage: Storage, caplog: pytest.LogCaptureFixture, limit: int | None, seen: int
) -> None:
    session = Recording()
    with pytest.raises(CollapseError) if limit else nullcontext():
        train_toy(storage, FadingStep(), session, images=400, log_images=4, collapse_limit=limit)
    assert session.recorded[-1].images == seen
    assert session.collapses == [((20 + WARNING_ROWS) * 4, "gradient_norm/toy")]
    assert caplog.text.count("toy may have collapsed: gradient_norm/toy is") == 1
