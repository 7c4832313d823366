"""Pictures that the page of a run asks for: samples, walks between seeds, reconstructions; and its report."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vavae.config import differences
from vavae.data.image import UnreadableImage, prepare_image
from vavae.data.pixels import difference_image, to_pixels, to_rgb
from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.interop.load import load_tokenizer
from vavae.latents.pictures import encode
from vavae.metrics.reconstruction import psnr
from vavae.models.tokenizer.representation import Autoencoder
from vavae.report.html import render
from vavae.report.run_report import run_report
from vavae.runs.evaluation_inputs import ReportInputs
from vavae.runs.run import Run
from vavae.sampling.sampler import Sampler

_BEFORE_KEY = re.compile(r"\s+(?=[\w.]+=)")
"""Space where the key of an override begins; other space belongs to a value."""

Captioned = tuple[Image.Image, str]
"""A picture and its caption."""


class Slider(NamedTuple):
    """A number of the configuration that may be changed without loading models anew."""

    key: str
    label: str
    value: float
    """Value in the configuration of the run."""
    low: float
    high: float
    step: float


@dataclass(frozen=True)
class Playground:
    """The models of a run; `Playground.at` loads what there is."""

    run: Run
    tokenizer: Autoencoder
    sampler: Sampler | None
    """None before there is a LightningDiT."""
    overrides: Sequence[str] = ()
    """Those of the configuration that the models were loaded with."""

    @classmethod
    def at(cls, folder: str, overrides: Sequence[str] = (), device: str | None = None) -> "Playground":
        """Load the tokenizer of the run in a folder, and its sampler where there is a LightningDiT.

        Args:
            folder: path or URL.
            overrides: `key.path=value`, as for `Sampler.from_run`.
            device: where to put the models; None takes a GPU where there is one.

        Raises:
            UserError: there is no run, it has no tokenizer yet, or the models can't be loaded.
        """
        run = Run.at(folder, overrides)
        if run.config.sample.weights is None and run.artifact("train_lightningdit") is None:
            return cls(run, load_tokenizer(run, device), None, overrides)
        sampler = Sampler.from_run(run, device=device)
        return cls(run, sampler.tokenizer, sampler, overrides)

    @property
    def sliders(self) -> list[Slider]:
        """Numbers that change the samples of these models: guidance of the kinds that they have, and steps."""
        assert self.sampler is not None, "without a LightningDiT there are no samples"
        config, model = self.run.config, self.sampler.lightningdit
        scales = []
        # A mean flow is guided by its training, unless the scale is an input of the network.
        if self.sampler.classes and (config.solver.name != "mean_flow" or model.guidance_embedder is not None):
            scales.append(("guidance.scale", "Guidance", config.guidance.scale, 10))
        if model.final_layer_xr is not None:
            scales.append(("guidance.internal_scale", "Internal guidance", config.guidance.internal_scale, 4))
        # A scale of 1 is no guidance.
        sliders = [Slider(key, label, now, min(1, now), max(high, 2 * now), 0.1) for key, label, now, high in scales]
        steps = config.solver.num_steps
        return [*sliders, Slider("solver.num_steps", "Steps", steps, 1, max(50, steps), 1)]

    @property
    def solvers(self) -> list[str]:
        """Names of the solvers that these models can take, the run's own first."""
        assert self.sampler is not None, "without a LightningDiT there are no samples"
        average = ["mean_flow"] if self.sampler.lightningdit.length_embedder is not None else []
        return [*dict.fromkeys([self.run.config.solver.name, "euler", "heun", *average])]

    def sample(
        self, classes: Sequence[str] | None, seed: int, images: int, overrides: Sequence[str]
    ) -> list[Captioned]:
        """Generate images of every class with so many seeds from one on, class after class, as `vavae sample` does.

        Args:
            classes: names; None where the images have no classes.
            seed: the first one.
            images: number of images of each class.
            overrides: `key.path=value` of guidance and solver, one or several in a text, with space between them.

        Raises:
            UserError: an override, a class or the seed is not valid, or an image is not finite.
        """
        seeds = range(seed, seed + images)
        pixels = self._changed(overrides).sample(classes, seeds)
        names = [f"{name}, " for name in classes or ()] or [""]
        return _captioned(pixels, [f"{name}seed {each}" for name in names for each in seeds])

    def walk(self, label: str | None, first: int, last: int, images: int, overrides: Sequence[str]) -> list[Captioned]:
        """Generate so many images from one seed to another of a class, see `Sampler.walk`."""
        pixels = self._changed(overrides).walk(first, last, images, label)
        between = [f"{place / (images - 1):.0%}" for place in range(1, images - 1)]
        return _captioned(pixels, [f"seed {first}", *between, f"seed {last}"])

    def command(self, classes: Sequence[str] | None, seed: int, images: int, overrides: Sequence[str]) -> str:
        """The command that makes the images of `sample`, with the keys that are not the run's own."""
        sampler = self._changed(overrides)
        assert sampler.config is not None, "it is of a run"
        changed = [
            f"{key}={new if isinstance(new, str) else json.dumps(new)}"
            for key, _, new in differences(self.run.config, sampler.config)
        ]
        names = [str(sampler.classes.index(name)) if "," in name else name for name in classes or ()]
        chosen = ["--classes", ",".join(names)] if names else []
        seeds = f"{seed}-{seed + images - 1}" if images > 1 else f"{seed}"
        words = ["--run", self.run.storage.url(), *chosen, "--seeds", seeds, *self.overrides, *changed]
        return shlex.join(["vavae", "sample", *words])

    def reconstruct(self, data: bytes) -> tuple[list[Captioned], str]:
        """Encode a picture, decode the mean of its posterior, and compare.

        Args:
            data: file of a picture of any size, which is cropped and scaled as the held-out images of the run were.

        Returns:
            The picture as the tokenizer sees it, its reconstruction, and four times their difference; and the PSNR in
            words.

        Raises:
            UserError: it can't be read as a picture, or the reconstruction is not finite.
        """
        shards = self.run.config.shards
        try:
            prepared = prepare_image(data, shards.height_and_width, form=shards.pixel_format)
        except UnreadableImage as error:
            raise UserError(f"this file can't be read as a picture: {error}") from error
        original = torch.from_numpy(prepared.copy()).movedim(-1, 0)[None]
        latents = encode(self.tokenizer, original)
        with torch.inference_mode():
            decoded = self.tokenizer.decode(latents)
        require_finite({"reconstruction": decoded}, "decode", "train the tokenizer again")
        restored = to_pixels(decoded, original.dtype).cpu()
        quality = psnr(restored, original).item()
        sizes = [" x ".join(map(str, each.shape[1:])) for each in (original, latents)]
        words = f"PSNR {quality:.2f} dB" if math.isfinite(quality) else "No difference"
        shown = [to_rgb(original), to_rgb(restored)]
        captions = ["as the tokenizer sees it", "reconstructed", "difference, four times"]
        pictures = _captioned(torch.cat([*shown, difference_image(*shown)]), captions)
        return pictures, f"{words}, {sizes[0]} pixels through {sizes[1]} latents"

    def report(self) -> str:
        """The report of the run as it is now, a whole page of HTML."""
        return render(run_report(ReportInputs.of(self.run)))

    def _changed(self, overrides: Sequence[str]) -> Sampler:
        assert self.sampler is not None, "without a LightningDiT there are no samples"
        single = [each for text in overrides for each in _BEFORE_KEY.split(text.strip()) if each]
        return self.sampler.with_overrides(single)


def _captioned(images: Tensor, captions: Sequence[str]) -> list[Captioned]:
    """Pictures of pixels [N, C, H, W], in color as everywhere where they are shown."""
    pixels = to_rgb(images).movedim(1, -1).contiguous().numpy()
    return [(Image.fromarray(image), caption) for image, caption in zip(pixels, captions, strict=True)]
