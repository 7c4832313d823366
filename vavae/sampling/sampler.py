"""From class labels and image indices to images: noise, guidance and solver, latent statistics, decoder."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.data.pixels import to_uint8
from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.diffusion.guidance import ClassifierFreeGuidance
from vavae.diffusion.solvers import solve
from vavae.errors import UserError
from vavae.interop.export import load_lightningdit, load_tokenizer
from vavae.latents.statistics import read_statistics
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.normalizer import LatentNormalizer
from vavae.randomness import torch_generator
from vavae.storage.storage import Storage


class Sampler(NamedTuple):
    """Everything that turns noise into images."""

    tokenizer: VAVAE
    lightningdit: LightningDiT
    normalizer: LatentNormalizer

    @classmethod
    def load(
        cls, tokenizer: Storage, tokenizer_digest: str, latents: Storage, lightningdit: Storage, device: torch.device
    ) -> "Sampler":
        """Load both exports and the statistics of the latents.

        Args:
            tokenizer: folder of the tokenizer's export.
            tokenizer_digest: digest of that export.
            latents: folder of the latents that the LightningDiT was trained on.
            lightningdit: folder of its export.
            device: where to put them.

        Raises:
            UserError: the LightningDiT was trained on another tokenizer's latents.
        """
        autoencoder, _ = load_tokenizer(tokenizer)
        model, description = load_lightningdit(lightningdit)
        if description.tokenizer != tokenizer_digest:
            raise UserError(
                f"{lightningdit.url()} was trained on latents of tokenizer {description.tokenizer[:12]}, but "
                f"{tokenizer.url()} is {tokenizer_digest[:12]}; take the tokenizer that belongs to it"
            )
        mean, std = read_statistics(latents)
        return cls(autoencoder.to(device), model.to(device), LatentNormalizer(mean, std).to(device))

    @torch.inference_mode()
    def images(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        seed: int,
        guidance: GuidanceConfig,
        solver: SolverConfig,
    ) -> Tensor:
        """Generate images: uint8 [B, 3, H, W].

        Args:
            indices: one number per image; its noise depends on the seed and on it alone.
            labels: class of each image.
            seed: of the run.
            guidance: classifier-free guidance.
            solver: of the flow.
        """
        model = self.lightningdit
        device = self.normalizer.mean.device
        shape = (model.latent_dim, *model.grid)
        noise = noise_of(indices, shape, seed)
        velocity = ClassifierFreeGuidance(model, model.null_label, guidance)
        latents = solve(velocity, noise.to(device), torch.tensor(labels, device=device), solver, velocity.jumps)
        return to_uint8(self.tokenizer.decode(self.normalizer.denormalize(latents))).cpu()

    def batches(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        seed: int,
        guidance: GuidanceConfig,
        solver: SolverConfig,
        batch_size: int,
    ) -> Iterator[Tensor]:
        """As :meth:`images`, so many at a time: uint8 [b, 3, H, W], b at most `batch_size`."""
        for start in range(0, len(indices), batch_size):
            batch = slice(start, start + batch_size)
            yield self.images(indices[batch], labels[batch], seed, guidance, solver)


def noise_of(indices: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """Unit Gaussian noise float32 [B, *shape] on the CPU, where it is the same for every device and batch."""
    return torch.stack([torch.randn(*shape, generator=torch_generator(seed, "sample", index)) for index in indices])
