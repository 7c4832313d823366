"""Floating-point operations per image: the networks and steps themselves are run on tensors without memory.

What is counted are multiplications and additions of convolutions and matrix products, two for each pair (Kaplan et al.,
arXiv 2001.08361, count likewise); norms, activations and optimizers are left out, as in published utilizations.
"""

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.runs.config import RunConfig
from vavae.runs.run import Job
from vavae.training.flops.meta_models import (
    MetaModel,
    images_of,
    latents_of,
    lightningdit_step,
    on_meta,
    tokenizer_step,
    velocity,
)


def training_flops(config: RunConfig, job: Job, images_seen: int = 0, *, recompute: bool = False) -> float:
    """FLOPs of one image in a training step: forward and backward of all that the step runs.

    Args:
        config: configuration of the run.
        job: `train_vavae` or `train_lightningdit`.
        images_seen: position in the training; it decides about the tokenizer's phase and adversary.
        recompute: count what `checkpoint_activations` computes again too; utilization leaves it out.
    """
    if not recompute:
        config = _without_recomputation(config)
    if job == "train_lightningdit":
        return _count(lightningdit_step(config, 1))
    assert job == "train_vavae", f"{job} trains nothing"
    phases = config.tokenizer_phases(images_seen + 1)
    phase = next(phase for phase in phases if images_seen < phase.until_images)
    adversarial, every = phase.losses.adversarial, phase.losses.adaptive.every
    adversary = adversarial.weight > 0 and images_seen >= adversarial.start_images
    measured = _count(tokenizer_step(config, phase, 1, adversary=adversary, measure_weights=True))
    if every == 1:
        return measured
    known = _count(tokenizer_step(config, phase, 1, adversary=adversary, measure_weights=False))
    return (measured + known * (every - 1)) / every


def encoding_flops(config: RunConfig) -> float:
    """FLOPs of encoding one image, without gradients."""
    model = on_meta(lambda: VAVAE(config.tokenizer))
    return _count(MetaModel(lambda: model.encode(images_of(config, 1)), (model,)))


def decoding_flops(config: RunConfig) -> float:
    """FLOPs of decoding one latent, without gradients."""
    model = on_meta(lambda: VAVAE(config.tokenizer))
    return _count(MetaModel(lambda: model.decode(latents_of(config, 1)), (model,)))


def velocity_flops(config: RunConfig) -> float:
    """FLOPs of one evaluation of the LightningDiT for one latent, without gradients."""
    return _count(velocity(config))


def _count(task: MetaModel) -> float:
    """Count the FLOPs of some work, attention as plain matrix products: the counter knows those on every device."""
    with task.ready() as work, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def _without_recomputation(config: RunConfig) -> RunConfig:
    sections = {name: getattr(config, name) for name in ("tokenizer", "lightningdit")}
    plain = {name: section.model_copy(update={"checkpoint_activations": False}) for name, section in sections.items()}
    return config.model_copy(update=plain)
