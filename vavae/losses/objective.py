"""The objective of the tokenizer: all its losses in one, which may be built inside a wrapped forward.

The sum to be minimized, per image (released code):

    L = nll + λ_d · w_d · g + λ_vf · w_vf · vf + w_kl · kl

with nll = Σ (|x - x̂| + w_p · p) over color values, p the perceptual distance of an image, g = -mean D(x̂),
λ_d = ‖∂nll/∂W‖ / ‖∂g/∂W‖ at the decoder's last convolution and λ_vf = ‖∂nll/∂W‖ / ‖∂vf/∂W‖ at the encoder's.

Both networks that take x̂ are differentiated once, at a detached leaf. The gradients of the image that come out are
handed to the decoder as the vectors of its vector-Jacobian products: the weight λ_d is known before the decoder is
differentiated, and ∂L/∂θ is the same as if the sum had been differentiated term by term.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vavae.losses.adversarial import generator_loss
from vavae.losses.config import TokenizerLossConfig
from vavae.losses.perceptual import Perceptual
from vavae.losses.vision_foundation import VisionFoundationTerms

_EPSILON = 1e-4


def adaptive_weight(reference_grad: Tensor, grad: Tensor, maximum: float) -> Tensor:
    """‖∇L_ref‖ / ‖∇L‖, equation 4 of arXiv 2501.01423 with the guards of the released code: scalar, float32, detached.

    Args:
        reference_grad: gradient of the reconstruction loss at the layer.
        grad: gradient of the loss to be weighted at the same layer, same shape.
        maximum: upper bound of the weight.
    """
    assert reference_grad.shape == grad.shape, f"gradients of one layer: {reference_grad.shape}, {grad.shape}"
    ratio = torch.linalg.vector_norm(reference_grad.float()) / (torch.linalg.vector_norm(grad.float()) + _EPSILON)
    return ratio.clamp(0.0, maximum).detach()


class TokenizerOutputs(NamedTuple):
    """Outputs of one forward pass of the tokenizer, with their graph."""

    images: Tensor
    """Images [B, 3, H, W] in [-1, 1]."""
    reconstruction: Tensor
    """Reconstructions [B, 3, H, W], decoded from the posterior sample, or from what became of it."""
    kl: Tensor | None
    """KL divergence of each posterior, [B], in nats; none where latents have no posterior."""
    alignment: VisionFoundationTerms | None
    """The vision-foundation loss of the same posterior sample; none where there is no teacher."""


class LastLayers(NamedTuple):
    """Parameters at which the adaptive weights are measured: the last layers of encoder and decoder."""

    encoder: Tensor | None
    """None of an encoder that is not trained; then there is no vision-foundation loss."""
    decoder: Tensor


class DecoderGraph(NamedTuple):
    """Inputs of the decoder, its latent and its parameters, with respect to which it is differentiated by itself."""

    latent: Tensor
    """Latent that was decoded, [B, C, h, w], with its graph from the posterior sample on."""
    parameters: Sequence[Tensor]
    """Parameters of the decoder to train, whole."""


class AdaptiveWeights(NamedTuple):
    """λ_vf and λ_d of one micro-batch: detached float32 scalars, before the constant weights are multiplied.

    None means not measured: the term is off, its weight is constant, or it has not been asked for yet.
    """

    vision_foundation: Tensor | None = None
    adversarial: Tensor | None = None


UNMEASURED = AdaptiveWeights()
"""Adaptive weights before any measurement."""


class TokenizerObjective(NamedTuple):
    """The total loss of one micro-batch, its terms, and the adaptive weights to keep."""

    objective: Tensor
    """Scalar whose value and gradient are those of the total loss."""
    terms: dict[str, Tensor]
    """Detached scalars by name."""
    adaptive: AdaptiveWeights
    """The adaptive weights that were used, measured here or handed in."""


class _ImageLosses(NamedTuple):
    """Losses of the reconstruction, scalars, and their gradients with respect to it, [B, 3, H, W]."""

    nll: Tensor
    l1: Tensor
    perceptual: Tensor
    nll_grad: Tensor
    adversarial: Tensor
    adversarial_grad: Tensor | None


def tokenizer_objective(
    config: TokenizerLossConfig,
    outputs: TokenizerOutputs,
    layers: LastLayers,
    perceptual: Perceptual | None,
    discriminator: Callable[[Tensor], Tensor] | None,
    known: AdaptiveWeights = UNMEASURED,
    decoder: DecoderGraph | None = None,
) -> TokenizerObjective:
    """Compose the losses of one micro-batch; all means are over its images.

    Args:
        config: weights of the terms.
        outputs: outputs of the tokenizer; the graph to the last layers must be alive.
        layers: the last convolutions' weights.
        perceptual: distance [B] of two batches of images; none leaves the term out.
        discriminator: images to logits, with frozen parameters; none before the adversary starts.
        known: adaptive weights of an earlier step, used as they are; what is missing and needed is measured. Ranks that
            partition parameters must know the same ones, because a measurement gathers parameters.
        decoder: its ends, where ranks hold whole parameters; then it is differentiated once for λ_vf and for training,
            as long as there is no adversary. None differentiates it for each.

    Returns:
        The objective, and the terms ``reconstruction`` (nll per image), ``l1`` (per color value), ``perceptual``,
        ``kl``, ``adversarial``, ``adversarial_weight`` (λ_d · w_d), ``total``, and with a teacher ``cosine``,
        ``distance``, ``alignment``, ``vf_weight`` (λ_vf · w_vf). A term that is off is zero; without posteriors
        there is no ``kl``.
    """
    reconstruction = outputs.reconstruction.float()
    leaf = reconstruction.detach().requires_grad_()
    image = _image_losses(config, outputs.images.float(), leaf, perceptual, discriminator)
    decoded = _Decoded(reconstruction, image, decoder)
    adaptive = _adaptive_weights(config, decoded, outputs.alignment, layers, image, known)
    image_grad, adversarial_weight = image.nll_grad, torch.zeros_like(image.nll)
    if image.adversarial_grad is not None:
        assert adaptive.adversarial is not None, "an adversary has an adaptive weight"
        adversarial_weight = config.adversarial.weight * adaptive.adversarial
        image_grad = image_grad + adversarial_weight * image.adversarial_grad
    beyond_images = torch.zeros_like(image.nll)
    terms = {"reconstruction": image.nll, "l1": image.l1, "perceptual": image.perceptual}
    if outputs.kl is not None:
        kl = outputs.kl.mean()
        beyond_images = config.kl_weight * kl
        terms["kl"] = kl.detach()
    terms |= {"adversarial": image.adversarial, "adversarial_weight": adversarial_weight}
    if outputs.alignment is not None:
        vf_weight = torch.full_like(image.nll, config.vision_foundation.weight)
        if adaptive.vision_foundation is not None:
            vf_weight = vf_weight * adaptive.vision_foundation
        beyond_images = beyond_images + vf_weight * outputs.alignment.total
        terms |= {
            "cosine": outputs.alignment.cosine,
            "distance": outputs.alignment.distance,
            "alignment": outputs.alignment.alignment,
            "vf_weight": vf_weight,
        }
    terms["total"] = image.nll + adversarial_weight * image.adversarial + beyond_images.detach()
    surrogate = decoded.with_gradient(image_grad) + beyond_images
    return TokenizerObjective(surrogate + (terms["total"] - surrogate.detach()), terms, adaptive)


def _image_losses(
    config: TokenizerLossConfig,
    images: Tensor,
    leaf: Tensor,
    perceptual: Perceptual | None,
    discriminator: Callable[[Tensor], Tensor] | None,
) -> _ImageLosses:
    absolute = (images - leaf).abs()
    distance = perceptual(images, leaf) if perceptual is not None else leaf.new_zeros(len(leaf))
    # The perceptual distance of an image counts once per color value.
    per_image = absolute.sum(dim=(1, 2, 3)) + config.perceptual.weight * distance * leaf[0].numel()
    nll = per_image.mean()
    (nll_grad,) = torch.autograd.grad(nll, leaf)
    adversarial, adversarial_grad = torch.zeros_like(nll), None
    if discriminator is not None:
        adversarial = generator_loss(discriminator(leaf))
        (adversarial_grad,) = torch.autograd.grad(adversarial, leaf)
    return _ImageLosses(
        nll.detach(),
        absolute.mean().detach(),
        distance.mean().detach(),
        nll_grad,
        adversarial.detach(),
        adversarial_grad,
    )


class _Decoded:
    """The reconstruction and its gradients on the way back through the decoder.

    Without an adversary all of it passes the decoder at once: the gradients of its parameters are kept, and that of the
    latent serves the adaptive weight first and the encoder afterwards.
    """

    def __init__(self, reconstruction: Tensor, image: _ImageLosses, decoder: DecoderGraph | None) -> None:
        self.reconstruction, self._decoder = reconstruction, None if image.adversarial_grad is not None else decoder
        self._nll_grad = image.nll_grad
        self._gradients: tuple[Tensor, ...] | None = None

    def reference(self, layer: Tensor) -> Tensor:
        """Gradient of the reconstruction loss at a layer of the encoder."""
        if self._decoder is None:
            (gradient,) = torch.autograd.grad(self.reconstruction, layer, self._nll_grad, retain_graph=True)
            return gradient
        latent, parameters = self._decoder
        self._gradients = torch.autograd.grad(self.reconstruction, (latent, *parameters), self._nll_grad)
        (gradient,) = torch.autograd.grad(latent, layer, self._gradients[0], retain_graph=True)
        return gradient

    def with_gradient(self, image_grad: Tensor) -> Tensor:
        """Scalar whose gradient is that of the losses of the image, given their gradient [B, 3, H, W] there."""
        if self._gradients is None or self._decoder is None:
            return (self.reconstruction * image_grad).sum()
        return _GivenGradients.apply(self._gradients, self._decoder.latent, *self._decoder.parameters)


class _GivenGradients(torch.autograd.Function):
    """Zero, with given gradients of some tensors: what engines take like that of any loss."""

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        """Keep the gradients; they are multiplied by whatever the engine multiplies the loss with."""
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all tensors."""
        (factor,) = factors
        return (None, *(factor * gradient for gradient in ctx.gradients))


def _adaptive_weights(
    config: TokenizerLossConfig,
    decoded: _Decoded,
    alignment: VisionFoundationTerms | None,
    layers: LastLayers,
    image: _ImageLosses,
    known: AdaptiveWeights,
) -> AdaptiveWeights:
    """Adaptive weights that the terms of this micro-batch need, measured where they are not known."""
    vision_foundation = adversarial = None
    if image.adversarial_grad is not None:
        adversarial = known.adversarial
        if adversarial is None:
            adversarial = _measure_adversarial(config, decoded.reconstruction, layers.decoder, image)
    if alignment is not None and config.vision_foundation.adaptive and config.vision_foundation.weight > 0:
        vision_foundation = known.vision_foundation
        if vision_foundation is None:
            assert layers.encoder is not None, "a frozen encoder is not aligned"
            vision_foundation = _measure_vf(config, decoded, layers.encoder, alignment.total)
    return AdaptiveWeights(vision_foundation, adversarial)


def _measure_adversarial(
    config: TokenizerLossConfig, reconstruction: Tensor, layer: Tensor, image: _ImageLosses
) -> Tensor:
    """Measure λ_d; both gradients end at the decoder's last convolution, so this costs next to nothing."""
    (reference,) = torch.autograd.grad(reconstruction, layer, image.nll_grad, retain_graph=True)
    (adversarial,) = torch.autograd.grad(reconstruction, layer, image.adversarial_grad, retain_graph=True)
    return adaptive_weight(reference, adversarial, config.adaptive.adversarial_max)


def _measure_vf(config: TokenizerLossConfig, decoded: _Decoded, layer: Tensor, vf: Tensor) -> Tensor:
    """Measure λ_vf; the reference passes the whole decoder on its way to the encoder's last convolution."""
    (alignment,) = torch.autograd.grad(vf, layer, retain_graph=True)
    return adaptive_weight(decoded.reference(layer), alignment, config.adaptive.vision_foundation_max)
