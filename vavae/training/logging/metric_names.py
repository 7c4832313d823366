"""The figures of a run: what each column of a row of metrics means, and its name in Prometheus."""

import re
from typing import NamedTuple

from vavae.diffusion.objective import TIMESTEP_BINS


class Column(NamedTuple):
    """One scalar of a row."""

    meaning: str
    adds_up: bool = False
    """Whether it is what there was since the row before, so that the sum over rows is a total."""
    of_machine: bool = False
    """Whether it says how the machine did. All others follow from configuration and data alone."""


def _share(what: str) -> Column:
    return Column(f"share of this rank's time {what}", of_machine=True)


COLUMNS: dict[str, Column] = {
    "loss/total": Column("sum of all losses with their weights"),
    "loss/reconstruction": Column("l1 and perceptual loss, summed over an image"),
    "loss/l1": Column("absolute difference of reconstruction and image"),
    "loss/perceptual": Column("difference of their features"),
    "loss/kl": Column("Kullback-Leibler divergence of posterior and standard normal"),
    "loss/adversarial": Column("what the discriminator says of reconstructions, to the generator"),
    "loss/discriminator": Column("what the discriminator itself learns from"),
    "loss/cosine": Column("marginal cosine loss"),
    "loss/distance": Column("marginal distance matrix loss"),
    "loss/velocity": Column("squared error of the velocity"),
    "loss/direction": Column("one less cosine of predicted and true velocity"),
    **{
        f"loss_at_timestep/{low / TIMESTEP_BINS:.1f}": Column(f"velocity loss from t = {low / TIMESTEP_BINS:.1f} on")
        for low in range(TIMESTEP_BINS)
    },
    "alignment": Column("cosine of projected latents and the teacher's features"),
    "adaptive_weight/vf": Column("weight of the vision-foundation loss"),
    "adaptive_weight/adversarial": Column("weight of the adversarial loss"),
    "latent/spectrum_slope": Column("exponent of the latents' power over spatial frequency, 0 for white noise"),
    "latent/effective_rank": Column("directions that the channels of the latents make use of"),
    "latent/channel_std_min": Column("standard deviation of the channel that varies least"),
    "latent/channel_std_max": Column("standard deviation of the channel that varies most"),
    "latent/local_to_global": Column("cosine of latent vectors near each other, less that of distant ones"),
    "logits_real": Column("mean of the discriminator on images"),
    "logits_fake": Column("mean of the discriminator on reconstructions"),
    "gradient_norm/generator": Column("norm of the tokenizer's gradient before clipping"),
    "gradient_norm/discriminator": Column("norm of the discriminator's gradient before clipping"),
    "gradient_norm/lightningdit": Column("norm of the LightningDiT's gradient before clipping"),
    "learning_rate": Column("of the last step"),
    "skipped_steps": Column("steps not applied because their gradients were not finite", adds_up=True),
    "loss_spikes": Column("steps with a loss far above those before them", adds_up=True),
    "unreadable_images": Column("different images that could not be read so far"),
    "images_per_second": Column("images that all ranks trained on, per second", of_machine=True),
    "flops_per_second": Column("FLOP/s of the models on all ranks", of_machine=True),
    "model_flop_utilisation": Column("their share of what the devices can do", of_machine=True),
    "data_wait": _share("spent waiting for data"),
    "forward": _share("in forward passes and losses, adaptive weights included"),
    "backward": _share("in backward passes, with what the engine does to gradients meanwhile"),
    "optimizer": _share("in the exchange of gradients, the update of the weights and of their average"),
    "observe_wait": _share("in which training stood still to be looked at"),
    "checkpoint_wait": _share("in which training stood still for a checkpoint"),
    "checkpoint/stall_seconds": Column("in which training stood still for checkpoints", True, True),
    "checkpoint/bytes": Column("copied for checkpoints on all ranks", True, True),
    "gpu_memory/peak_bytes": Column("most that tensors of this rank took", of_machine=True),
    "gpu_memory/reserved_bytes": Column("taken from the GPU by this rank", of_machine=True),
    "storage/bytes_read": Column("read from stores on all ranks", True, True),
    "storage/bytes_written": Column("written to stores on all ranks", True, True),
    "storage/requests": Column("requests to stores of all ranks", True, True),
    "storage/retries": Column("requests to stores that had to be repeated", True, True),
}
"""By name."""

BESIDE: dict[str, Column] = {
    "images": Column("images that the stage is done with"),
    "images_planned": Column("images of the stage"),
    "stage_running": Column("1 while the stage is at work, then 0"),
    "restarts": Column("how often all workers of the training were started again"),
    "saved_timestamp_seconds": Column("when the last checkpoint was copied, or the workers started"),
}
"""What is shown of a running job beside its rows."""


def column(name: str) -> Column:
    """The column of this name; one that is not listed is taken for a mean."""
    return (COLUMNS | BESIDE).get(name, Column(name))


def metric_name(name: str) -> str:
    """The name in Prometheus: `loss/total` → `vavae_loss_total`."""
    return "vavae_" + re.sub(r"\W+", "_", name)
