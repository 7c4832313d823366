"""Registry of the metrics in a training's rows: their descriptions and names in Prometheus."""

import re
from typing import NamedTuple

from vavae.diffusion.config import TIMESTEP_BINS


class MetricInfo(NamedTuple):
    """Description of one metric of a row."""

    meaning: str
    adds_up: bool = False
    """It counts since the row before, so that the sum over rows is a total."""
    of_machine: bool = False
    """It depends on the machine. All others follow from configuration and data alone."""


def _share(what: str) -> MetricInfo:
    return MetricInfo(f"share of this rank's time {what}", of_machine=True)


METRICS: dict[str, MetricInfo] = {
    "loss/total": MetricInfo("sum of all losses with their weights"),
    "loss/reconstruction": MetricInfo("l1 and perceptual loss, summed over an image"),
    "loss/l1": MetricInfo("absolute difference of reconstruction and image"),
    "loss/perceptual": MetricInfo("difference of their features"),
    "loss/kl": MetricInfo("Kullback-Leibler divergence of posterior and standard normal"),
    "loss/adversarial": MetricInfo("what the discriminator says of reconstructions, to the generator"),
    "loss/discriminator": MetricInfo("what the discriminator itself learns from"),
    "loss/cosine": MetricInfo("marginal cosine loss"),
    "loss/distance": MetricInfo("marginal distance matrix loss"),
    "loss/velocity": MetricInfo("squared error of the velocity"),
    "loss/intermediate": MetricInfo("mean squared error of the velocity of the intermediate head"),
    "loss/instantaneous": MetricInfo("squared error of the velocity beside average ones"),
    "loss/representation": MetricInfo("minus the cosine of projected tokens and the teacher's features"),
    "loss/class_token": MetricInfo("mean squared error of the velocity of the class token"),
    "loss/direction": MetricInfo("one less cosine of predicted and true velocity"),
    **{
        f"loss_at_timestep/{low / TIMESTEP_BINS:.1f}": MetricInfo(
            f"velocity loss from t = {low / TIMESTEP_BINS:.1f} on"
        )
        for low in range(TIMESTEP_BINS)
    },
    "alignment": MetricInfo("cosine of projected latents and the teacher's features"),
    "adaptive_weight/vf": MetricInfo("weight of the vision-foundation loss"),
    "adaptive_weight/adversarial": MetricInfo("weight of the adversarial loss"),
    "latent/spectrum_slope": MetricInfo("exponent of the latents' power over spatial frequency, 0 for white noise"),
    "latent/effective_rank": MetricInfo("directions that the channels of the latents make use of"),
    "latent/channel_std_min": MetricInfo("standard deviation of the channel that varies least"),
    "latent/channel_std_max": MetricInfo("standard deviation of the channel that varies most"),
    "latent/local_to_global": MetricInfo("cosine of latent vectors near each other, less that of distant ones"),
    "latent/high_frequency_share": MetricInfo("share of the latents' energy at high spatial frequencies"),
    "latent/velocity_variance": MetricInfo(
        "variance of the velocity that no network can predict, of latents as one class"
    ),
    "equivariance_error/quarter_turn": MetricInfo(
        "turned decodings against decoded turns, over the reconstruction error"
    ),
    "equivariance_error/half_size": MetricInfo(
        "halved decodings against decoded halves, over the reconstruction error"
    ),
    "logits_real": MetricInfo("mean of the discriminator on images"),
    "logits_fake": MetricInfo("mean of the discriminator on reconstructions"),
    "discriminator_accuracy": MetricInfo("share of the discriminator's logits of the right sign"),
    "output_variance": MetricInfo("variance of reconstructions or predicted velocities over that of the true ones"),
    "gradient_norm/generator": MetricInfo("norm of the tokenizer's gradient before clipping"),
    "gradient_norm/discriminator": MetricInfo("norm of the discriminator's gradient before clipping"),
    "gradient_norm/lightningdit": MetricInfo("norm of the LightningDiT's gradient before clipping"),
    "learning_rate": MetricInfo("of the last step"),
    "skipped_steps": MetricInfo("steps not applied because their gradients were not finite", adds_up=True),
    "loss_spikes": MetricInfo("steps with a loss far above those before them", adds_up=True),
    "unreadable_images": MetricInfo("different images that could not be read so far"),
    "images_per_second": MetricInfo("images that all ranks trained on, per second", of_machine=True),
    "flops_per_second": MetricInfo("FLOP/s of the models on all ranks", of_machine=True),
    "model_flop_utilisation": MetricInfo("their share of what the devices can do", of_machine=True),
    "data_wait": _share("spent waiting for data"),
    "forward": _share("in forward passes and losses, adaptive weights included"),
    "backward": _share("in backward passes, with what the engine does to gradients meanwhile"),
    "optimizer": _share("in the exchange of gradients, the update of the weights and of their average"),
    "observe_wait": _share("in which training waited for callbacks"),
    "checkpoint_wait": _share("in which training waited for a checkpoint"),
    "checkpoint/stall_seconds": MetricInfo("seconds in which training waited for checkpoints", True, True),
    "checkpoint/bytes": MetricInfo("copied for checkpoints on all ranks", True, True),
    "gpu_memory/peak_bytes": MetricInfo("most that tensors of this rank took", of_machine=True),
    "gpu_memory/reserved_bytes": MetricInfo("taken from the GPU by this rank", of_machine=True),
    "storage/bytes_read": MetricInfo("read from stores on all ranks", True, True),
    "storage/bytes_written": MetricInfo("written to stores on all ranks", True, True),
    "storage/requests": MetricInfo("requests to stores of all ranks", True, True),
    "storage/retries": MetricInfo("requests to stores that had to be repeated", True, True),
}
"""Metrics of a training's rows, by name."""

JOB_METRICS: dict[str, MetricInfo] = {
    "images": MetricInfo("images that the job is done with"),
    "images_planned": MetricInfo("images of the job"),
    "stage_running": MetricInfo("1 while the job is at work, then 0"),
    "restarts": MetricInfo("how often all workers of the training were started again"),
    "saved_timestamp_seconds": MetricInfo("when the last checkpoint was copied, or the workers started"),
}
"""Metrics of a running job besides its rows, by name."""


def metric_info(name: str) -> MetricInfo:
    """Look up a metric; one that is not listed is taken for a mean."""
    return (METRICS | JOB_METRICS).get(name, MetricInfo(name))


def metric_name(name: str) -> str:
    """Name of a metric in Prometheus: `loss/total` → `vavae_loss_total`."""
    return "vavae_" + re.sub(r"\W+", "_", name)
