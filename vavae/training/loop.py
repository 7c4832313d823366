"""The training loop: the order of things, the same for both models. The mathematics is the step object's."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing

from vavae.data.config import StreamConfig
from vavae.data.loading import load_slices
from vavae.data.order import Round
from vavae.data.stream import ImageStream
from vavae.distributed.world import World
from vavae.progress import Progress, Rate
from vavae.training.checkpoint import Checkpoints, TrainState
from vavae.training.config import TrainingConfig
from vavae.training.log import Meter, MetricsLog
from vavae.training.schedule import learning_rate
from vavae.training.session import Session
from vavae.training.step import Step

_PROGRESS_SECONDS = 0.5
_HEADLINE = ("loss/total", "data_wait")


class NonFiniteError(ArithmeticError):
    """A gradient left the finite numbers. The last checkpoint is the place to go on from."""


def train(
    stage: str,
    step: Step,
    rounds: Sequence[Round],
    span: range,
    config: TrainingConfig,
    reading: StreamConfig,
    checkpoints: Checkpoints,
    log: MetricsLog,
    session: Session,
    world: World,
) -> TrainState:
    """Train until enough images are seen or the session asks to stop; returns the state at the end.

    Starts from the newest checkpoint where there is one and leaves one behind. Every rank calls it.

    Args:
        stage: name of the job, for logs.
        step: the model, its data and its losses.
        rounds: this rank's share of every step.
        span: images seen at which to begin, with the weights that the step has got, and at which to end.
        config: batch, schedule, intervals, and the budget to be shown.
        reading: how slices are read ahead.
        checkpoints: where state is kept.
        log: rows of metrics.
        session: whoever runs this.
        world: the ranks.

    Raises:
        NonFiniteError: a gradient was infinite or not a number; every rank raises it, and nothing is saved.
    """
    state = checkpoints.restore(step, span.start)
    if state.images_seen >= span.stop:
        return state
    log.rewind(state.images_seen)
    source = step.source()
    stream = load_slices(
        source,
        rounds,
        state.images_seen // config.batch_size,
        reading.workers,
        pin_memory=world.device.type == "cuda",
        prefetch_bytes=reading.prefetch_bytes,
        ranks=int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
    )
    meter = Meter(world, source.quarantine.names if isinstance(source, ImageStream) else ())
    rate, shown = Rate(), -math.inf
    row: dict[str, float] = {}
    stop = False
    with closing(stream):
        while not stop:
            with meter.waiting():
                slices = next(stream)
            lr = learning_rate(config.optimizer.learning_rate, config.schedule, state.images_seen)
            result = step.run(slices, state.images_seen, lr)
            for name, norm in result.gradient_norms.items():
                if not math.isfinite(norm):
                    raise NonFiniteError(f"{stage}: {name} is {norm} after {state.images_seen} images")
            if step.ema is not None:
                step.ema.update()
            before, state = state.images_seen, state.advanced(config.batch_size)
            meter.add(result, config.batch_size)

            done = state.images_seen >= span.stop
            stop = world.any(session.stop_requested()) or done
            save = stop or _crosses(before, state.images_seen, config.checkpoint_images)
            if save or _crosses(before, state.images_seen, config.log_images):
                row = meter.row() | {"learning_rate": lr}
                log.add(state.images_seen, row)
            if world.is_first and (done or time.monotonic() - shown > _PROGRESS_SECONDS):
                shown = time.monotonic()
                seen = state.images_seen
                session.progress(Progress(stage, seen, config.images, rate=rate.update(seen), terms=_headline(row)))
            if save:
                log.flush(state.images_seen)
                checkpoints.save(step, state)
                session.checkpoint(state.images_seen, row)
    checkpoints.settle()
    log.close()
    return state


def _headline(row: Mapping[str, float]) -> dict[str, float]:
    """The few figures of a row that a line of progress has room for."""
    return {name: row[name] for name in _HEADLINE if name in row}


def _crosses(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of the interval lies in (before, after]."""
    return before // interval < after // interval
