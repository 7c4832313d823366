"""Averages by other power profiles than a training kept, reconstructed from its snapshots after it."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vavae.errors import UserError
from vavae.interop.averages import load_weights
from vavae.interop.export import WEIGHTS, commit_export, load_exported_lightningdit
from vavae.runs.checkpoints import CHECKPOINTS, average_set, find_checkpoints
from vavae.runs.run import Run
from vavae.runs.training_config import LightningDiTTrainingConfig
from vavae.storage.artifact import Artifact
from vavae.storage.storage import Storage
from vavae.training.checkpoints.snapshots import SNAPSHOTS, find_snapshots
from vavae.training.power_profiles import PowerProfile, ProfileSum, nearest_sum

_REACHED = 0.1
"""Largest error of a profile, relative to its norm, at which it counts as reached."""
_NARROW = 0.8
"""Share of the smallest std kept below which rounding grows too much in the sum."""


class StoredAverage(NamedTuple):
    """An average by a power profile in a snapshot, or in a checkpoint."""

    profile: PowerProfile
    name: str
    """Name among `averages`."""
    folder: str
    """Folder in that of the training."""


class Reconstruction(NamedTuple):
    """A wished profile as a sum of stored averages."""

    wished: PowerProfile
    averages: list[StoredAverage]
    sum: ProfileSum

    @property
    def warning(self) -> str | None:
        """Line about a profile so narrow that rounding matters; None where it is not."""
        narrowest = min(average.profile.std for average in self.averages)
        if self.wished.std >= _NARROW * narrowest:
            return None
        return (
            f"std {self.wished.std:g} is much narrower than {narrowest:g}, the narrowest that was kept: rounding of "
            f"the snapshots grows by {self.sum.amplification:.0f}"
        )


def plan_reconstruction(
    training: Storage, config: LightningDiTTrainingConfig, std: float, images_seen: int | None
) -> Reconstruction:
    """Find the averages that a profile is reconstructed from, and their coefficients.

    Args:
        training: folder of the training.
        config: its section of the configuration.
        std: relative standard deviation of the profile.
        images_seen: at its end; None takes the newest snapshot.

    Raises:
        UserError: there are no snapshots, none of that moment, or their profiles do not add up to this one.
    """
    stored = _stored_averages(training, config)
    ends = sorted({average.profile.images_seen for average in stored})
    if not ends:
        raise UserError(
            f"{training.url()}: no snapshots of averages by power profiles: train with averages that have a std and "
            "with average_snapshot_images"
        )
    end = ends[-1] if images_seen is None else images_seen
    if end not in ends:
        near = ", ".join(map(str, sorted(sorted(ends, key=lambda each: abs(each - end))[:4])))
        raise UserError(f"--images {end}: no snapshot of that moment in {training.url()}; the nearest are of {near}")
    averages = [average for average in stored if average.profile.images_seen <= end]
    wished = PowerProfile(end, std)
    found = nearest_sum([average.profile for average in averages], wished)
    if found.error > _REACHED:
        kept = ", ".join(f"{each:g}" for each in sorted({average.profile.std for average in averages}))
        count = sum(each <= end for each in ends)
        raise UserError(
            f"--std {std:g} can't be reached from {count} snapshots with std {kept}: the nearest profile is "
            f"{found.error:.0%} off; take more snapshots, or a std between or near those"
        )
    return Reconstruction(wished, averages, found)


def reconstruct_average(
    run: Run, name: str, reconstruction: Reconstruction, progress: Callable[[int], None] = lambda _: None
) -> Artifact:
    """Add up the averages of a reconstruction in float64, and export the sum under a name; returns its record.

    It holds the weights twice, in float64 and of one average in float32.

    Args:
        run: run with a trained LightningDiT.
        name: name of the new average.
        reconstruction: averages and coefficients.
        progress: takes the number of averages that are added.

    Raises:
        UserError: the run has no export yet, or a file is damaged.
    """
    run = run.snapshot()
    training = run.training_folder("train_lightningdit")
    model, description = load_exported_lightningdit(run.stored("train_lightningdit").folder)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    total = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in state.items()}
    tensors = {f"model.{key}": tensor for key, tensor in state.items()}
    for done, (average, weight) in enumerate(
        zip(reconstruction.averages, reconstruction.sum.coefficients.tolist(), strict=True), 1
    ):
        images_seen, folder = average.profile.images_seen, average.folder
        # What else is trained is not exported.
        load_weights(training, images_seen, tensors, average_set(average.name), folder, prefix="model.")
        for key, tensor in state.items():
            total[key].add_(tensor, alpha=weight)
        progress(done)
    weights = {key: tensor.to(state[key].dtype) for key, tensor in total.items()}
    wished = reconstruction.wished
    return commit_export(
        run.average_output(name),
        description,
        {WEIGHTS: weights},
        wished.images_seen,
        std=wished.std,
        error=reconstruction.sum.error,
        averages=len(reconstruction.averages),
    )


def _stored_averages(training: Storage, config: LightningDiTTrainingConfig) -> list[StoredAverage]:
    """The averages by power profiles in all snapshots, and in the newest checkpoint where it is newer than these."""
    moments = dict.fromkeys(find_snapshots(training), SNAPSHOTS)
    newest = max(find_checkpoints(training), default=0)
    if newest > max(moments, default=0):
        moments[newest] = CHECKPOINTS
    return [
        StoredAverage(PowerProfile(images_seen, average.std), average.name, folder)
        for images_seen, folder in moments.items()
        for average in config.power_averages
        if average.std is not None
    ]
