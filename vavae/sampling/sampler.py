"""From class labels and indices of noise to images: guidance and solver, latent statistics, decoder."""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vavae.config import differences
from vavae.config.load import override
from vavae.data.pixels import pixel_dtype, to_pixels
from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.diffusion.guidance import guide
from vavae.diffusion.solvers import solve, solve_mean_flow
from vavae.distributed.compilation import compile_each, compiles_blocks
from vavae.distributed.config import Precision
from vavae.distributed.device import choose_device
from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.interop.averages import load_lightningdit_of_checkpoint
from vavae.interop.export import load_exported_lightningdit, load_latent_models
from vavae.interop.load import Source
from vavae.latents.manifest import read_latent_manifest
from vavae.latents.statistics import LatentNormalizer
from vavae.models.dit.class_token import join_class_token
from vavae.models.dit.model import LightningDiT
from vavae.models.dit.routing import kept_tokens
from vavae.models.tokenizer.representation import Autoencoder
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.runs.run import Run, StoredArtifact, StoredCheckpoint
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.labels import check_classes, wanted_labels
from vavae.sampling.request import SampleRequest

_CHANGEABLE = ("seed", "guidance", "solver")
"""Sections of the configuration that say nothing about what a sampler has loaded."""
_LEAST_SINE = 1e-6
"""Sine of the angle between two directions from which on they are two."""


@dataclass(frozen=True, repr=False)
class Sampler:
    """The models that turn noise into images, with the seed, guidance and solver of the run that they are from.

    `Sampler.from_run` loads one, `sample` generates images, and `with_overrides` changes how. Its `tokenizer` decodes;
    `normalizer` normalizes latents of the tokenizer to those of the `lightningdit`, and back; `classes` are the names
    of the classes.
    """

    tokenizer: Autoencoder
    lightningdit: LightningDiT
    normalizer: LatentNormalizer
    precision: Precision = "fp32"
    """Precision of the layers of both models; the solver's state and the decoder's output are float32."""
    depth: int = 8
    """Bits of a channel of the images."""
    weak: LightningDiT | None = None
    """Model of `guidance.weak`."""
    config: RunConfig | None = None
    """Configuration of the run; None where models were put together without one, which `images` alone can use."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their labels; none where the images have none."""

    @classmethod
    def from_run(
        cls, run: Source, overrides: Sequence[str] = (), device: torch.device | str | None = None
    ) -> "Sampler":
        """Load the sampler of a trained run.

        Blocks are compiled only where `sample.compile_blocks=true` asks for it: the first images of each number would
        take a minute or more.

        Args:
            run: path or URL of its folder, such as `runs/quickstart`; `hf-hub:owner/name`, where `vavae push` has put
                it; or the run.
            overrides: `key.path=value`, as on the command line of a job: `guidance.scale=2`, or `sample.weights=NAME`
                for another average of the weights.
            device: where to put the models, such as `cuda:1`; None takes a GPU where there is one.

        Raises:
            UserError: there is no run, it has no trained models yet, they don't belong together, an override is not
                valid, or there is no such device.
        """
        run = Run(override(run.config, overrides), run.published) if isinstance(run, Run) else Run.at(run, overrides)
        inputs = SamplingInputs.of(run)
        sample = inputs.config.sample
        compiles = sample.model_copy(update={"compile_blocks": bool(sample.compile_blocks)})
        return cls.load(replace(inputs, config=inputs.config.model_copy(update={"sample": compiles})), device)

    @classmethod
    def of(
        cls,
        tokenizer: Autoencoder,
        lightningdit: LightningDiT,
        normalizer: LatentNormalizer,
        config: RunConfig,
        device: torch.device,
        weak: LightningDiT | None = None,
        classes: tuple[str, ...] = (),
    ) -> "Sampler":
        """Move models to the device where they are to sample, in the precision and compiled as `config.sample` says."""
        transformers = [lightningdit] if weak is None else [lightningdit, weak]
        if compiles_blocks(config.sample.compile_blocks, config.workers, device):
            blocks = [block for each in transformers for block in each.all_blocks]
            compile_each([*blocks, *tokenizer.residual_blocks()])
        models = tokenizer.to(device), lightningdit.to(device), normalizer.to(device)
        weak = None if weak is None else weak.to(device)
        return cls(*models, config.sample.precision, config.shards.depth, weak, config, classes)

    @classmethod
    def load(cls, inputs: SamplingInputs, device: torch.device | str | None = None) -> "Sampler":
        """Load both exported models and the statistics of the latents.

        Args:
            inputs: the exports and the latents.
            device: where to put them; None takes a GPU where there is one.

        Raises:
            UserError: the LightningDiT was trained on another tokenizer's latents, the weak model can't guide it, there
                are no classes to guide to, or there is no such device.
        """
        device = choose_device(device)
        classes = read_latent_manifest(inputs.latents.folder).classes
        check_classes(inputs.config, classes)
        autoencoder, model, normalizer = load_latent_models(inputs)
        weak = load_weak_model(inputs.weak, model)
        return cls.of(autoencoder, model, normalizer, inputs.config, device, weak, classes)

    def __repr__(self) -> str:
        model, config = self.lightningdit, self.config
        height, width = (side * self.tokenizer.config.downsample for side in model.grid)
        parts = [f"{height} x {width} pixels", *([f"{len(self.classes)} classes"] if self.classes else [])]
        if config is not None:
            parts = [f"run {config.name}", *parts, config.solver.summary, config.guidance.summary]
        return f"<Sampler: {', '.join(parts)}, on {self.device}>"

    @property
    def device(self) -> torch.device:
        """The device of all models."""
        return self.normalizer.mean.device

    def with_overrides(self, overrides: Sequence[str]) -> "Sampler":
        """The same models with another seed, guidance or solver; nothing is loaded again.

        Args:
            overrides: `key.path=value`, such as `guidance.scale=4` or `solver.num_steps=32`.

        Raises:
            UserError: there is no such key, its value is not valid, or it says what is loaded.
        """
        before = self._run_config()
        config = override(before, overrides)
        for path, _, _ in differences(before, config):
            if path.partition(".")[0] not in _CHANGEABLE or path.startswith("guidance.weak"):
                raise UserError(f"{path} says what a sampler loads: give it to Sampler.from_run")
        return replace(self, config=config)

    def sample(self, classes: Sequence[int | str] | int | str | None = None, seeds: Iterable[int] | int = 0) -> Tensor:
        """Generate images of every class with every seed, class after class, as `vavae sample` does.

        Args:
            classes: names or numbers of classes, or one; left out where the images have no classes.
            seeds: indices of the noise, or one, each at least 0; seed i is the noise of image i of the run's samples.

        Returns:
            Pixels uint8 [classes * seeds, C, H, W] on the CPU, uint16 where those of the run have 16 bits.

        Raises:
            UserError: no such class exists, a seed is no such number, or an image is not finite.
        """
        names = [classes] if isinstance(classes, (str, int, np.integer)) else classes
        request = SampleRequest(wanted_labels(names, self.classes, "classes"), _seeds(seeds))
        if not request.indices:
            raise UserError(f"classes={classes}, seeds={seeds}: this asks for no image: give one of each at least")
        return torch.cat([*self.generate(request)])

    def generate(self, request: SampleRequest) -> Iterator[Tensor]:
        """Generate what is asked for in batches uint8 or uint16 [b, C, H, W], b at most `sample.batch_size`."""
        config = self._run_config()
        return self.batches(
            request.indices, request.labels, config.seed, config.guidance, config.solver, config.sample.batch_size
        )

    def _run_config(self) -> RunConfig:
        if self.config is None:
            raise UserError("this sampler was put together without a run: take Sampler.from_run, or its method images")
        return self.config

    def walk(self, first: int, last: int, images: int = 8, label: int | str | None = None) -> Tensor:
        """Generate the images of two seeds and some between them, whose noise is interpolated on the sphere.

        Guidance by routing draws its tokens as for the nearer of the two seeds.

        Args:
            first: index of the noise of the first image, at least 0.
            last: that of the last one.
            images: number of images with both ends, at least 2.
            label: name or number of the class; left out where the images have no classes.

        Returns:
            Pixels uint8 [images, C, H, W] on the CPU, uint16 where those of the run have 16 bits.

        Raises:
            UserError: no such class exists, a seed or the number of images is too small, or an image is not finite.
        """
        if images < 2:
            raise UserError(f"images={images}: expected both ends, 2 images at least")
        config, ends = self._run_config(), _seeds([first, last])
        labels = wanted_labels(None if label is None else [label], self.classes, "label") * images
        weights, (start, end) = torch.linspace(0, 1, images), self._noise(ends, config.seed)
        noise, nearer = spherical(start, end, weights), [ends[int(each > 0.5)] for each in weights]
        how, parts = (config.seed, config.guidance, config.solver), _slices(images, config.sample.batch_size)
        return torch.cat([self._from_noise(noise[part], nearer[part], labels[part], *how) for part in parts])

    def images(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        seed: int,
        guidance: GuidanceConfig,
        solver: SolverConfig,
    ) -> Tensor:
        """Generate images: uint8 or uint16 [B, C, H, W].

        Args:
            indices: index of each image's noise, which depends on it and the seed alone.
            labels: class of each image.
            seed: seed of the run.
            guidance: all guidance.
            solver: solver of the flow.

        Raises:
            UserError: an image is not finite; it would be black. Or guidance or solver ask for what the model has not.
        """
        return self._from_noise(self._noise(indices, seed), indices, labels, seed, guidance, solver)

    def _noise(self, indices: Sequence[int], seed: int) -> Tensor:
        """Noise float32 [B, *state_shape] on the CPU: of latents, joined with that of class tokens where there are."""
        model = self.lightningdit
        noise = noise_of(indices, (model.latent_dim, *model.grid), seed)
        if model.config.class_token is None:
            return noise
        width = model.config.class_token.width
        generators = [torch_generator(seed, "sample class token", index) for index in indices]
        return join_class_token(noise, torch.stack([torch.randn(width, generator=each) for each in generators]))

    @torch.inference_mode()
    def _from_noise(
        self,
        noise: Tensor,
        indices: Sequence[int],
        labels: Sequence[int],
        seed: int,
        guidance: GuidanceConfig,
        solver: SolverConfig,
    ) -> Tensor:
        """Generate images from noise of `_noise`; the indices key what is drawn in between. See :meth:`images`."""
        model, device = self.lightningdit, self.device
        self._check(guidance, solver)
        keep = None
        if guidance.routing_scale != 1:
            generators = [torch_generator(seed, "sample routing", index) for index in indices]
            keep = partial(_kept_tokens, generators, math.prod(model.tokens), device)
        weak = None if self.weak is None else self.autocast()(self.weak.forward)
        predict, x, y = self.autocast()(model.predict), noise.to(device), torch.tensor(labels, device=device)
        if solver.name == "mean_flow":
            inputs = None
            if model.guidance_embedder is not None:
                inputs = torch.tensor([[guidance.scale, *guidance.interval]], device=device)
            average = partial(predict, guidance=inputs)
            state = solve_mean_flow(lambda x, t, y, r: average(x, t, y, end=r).velocity, x, y, solver)
        else:
            velocity = guide(predict, model.null_label, guidance, weak, keep)
            by_euler = any(each.config.predicts_data for each in (model, self.weak) if each is not None)
            size = math.prod((model.latent_dim, *model.grid))
            state = solve(velocity, x, y, solver, velocity.jumps, ends_by_euler=by_euler, dimension=size)
        latents = state[:, : model.latent_dim]
        decode = self.autocast()(self.tokenizer.decode)
        decoded = decode(self.normalizer.denormalize(latents))
        finite = decoded.isfinite().all()
        images = to_pixels(decoded, pixel_dtype(self.depth)).cpu()  # the host waits here, and not for the flag
        if not finite:
            self._refuse(latents, decoded.isfinite().flatten(1).all(1), indices)
        return images

    def _check(self, guidance: GuidanceConfig, solver: SolverConfig) -> None:
        """Raise a UserError where guidance or solver ask for a part that the LightningDiT does not have."""
        model, routing = self.lightningdit, self.lightningdit.config.routing
        if guidance.internal_scale != 1 and model.final_layer_xr is None:
            raise UserError(
                f"guidance.internal_scale={guidance.internal_scale:g}, but the LightningDiT has no intermediate head "
                "(lightningdit.intermediate_head): set it to 1"
            )
        if solver.name == "mean_flow" and model.length_embedder is None:
            raise UserError(
                "solver.name=mean_flow takes steps by average velocities, and the LightningDiT was trained without "
                "objective.mean_flow: set euler or heun"
            )
        if guidance.path_drop and (routing is None or routing.fuse is None):
            raise UserError(
                "guidance.path_drop=true, but the LightningDiT has no lightningdit.routing.fuse: set it to false"
            )
        if guidance.routing_scale != 1 and routing is None:
            raise UserError(
                f"guidance.routing_scale={guidance.routing_scale:g}, but the LightningDiT was trained without "
                "lightningdit.routing: set it to 1"
            )

    def _refuse(self, latents: Tensor, finite: Tensor, indices: Sequence[int]) -> None:
        """Raise the UserError that says where values came from that are not finite, in weights or in latents."""
        remedy = "take an earlier checkpoint"
        require_finite(self.lightningdit.state_dict(), "weights of the LightningDiT", remedy)
        require_finite(self.tokenizer.state_dict(), "weights of the tokenizer", remedy)
        require_finite(self.normalizer.state_dict(), "statistics of the latents", "compute the latents again")
        bad = int(finite.logical_not().nonzero()[0])
        if latents[bad].isfinite().all():
            what, cure = "the tokenizer's decoder overflows", "train that tokenizer again"
        else:
            what, cure = "the LightningDiT's latent is not finite", "lower guidance.scale, take more solver.num_steps"
        raise UserError(
            f"sample {indices[bad]}: {what}, though all weights are finite: set sample.precision=fp32, or {cure}"
        )

    def autocast(self) -> torch.autocast:
        """The autocast that both models run under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def batches(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        seed: int,
        guidance: GuidanceConfig,
        solver: SolverConfig,
        batch_size: int,
    ) -> Iterator[Tensor]:
        """Generate images in batches uint8 [b, 3, H, W], b at most `batch_size`; see :meth:`images`."""
        for batch in _slices(len(indices), batch_size):
            yield self.images(indices[batch], labels[batch], seed, guidance, solver)


def load_weak_model(stored: StoredArtifact | StoredCheckpoint | None, model: LightningDiT) -> LightningDiT | None:
    """Load the model that is to guide a better one, on the CPU; None stays None.

    Raises:
        UserError: it is for latents of another shape, or for other classes; or a file of its checkpoint is damaged.
    """
    if stored is None:
        return None
    if isinstance(stored, StoredCheckpoint):  # of the training of the model that it is to guide
        return load_lightningdit_of_checkpoint(
            stored.training, stored.images_seen, model.config, model.latent_dim, model.grid
        )
    weak, _ = load_exported_lightningdit(stored.folder)
    for name in ("latent_dim", "grid", "null_label", "state_shape"):
        ours, theirs = getattr(model, name), getattr(weak, name)
        if ours != theirs:
            what = {"null_label": "classes", "state_shape": "the shape with class tokens"}.get(name, name)
            raise UserError(f"{stored.folder.url()}: {what} is {theirs}, but {ours} in the model that it is to guide")
    return weak


def _seeds(seeds: Iterable[int] | int) -> list[int]:
    """Indices of noise as plain integers; UserError where one is none."""
    try:
        found = [operator.index(each) for each in (seeds if isinstance(seeds, Iterable) else [seeds])]
    except TypeError:
        found = [-1]
    if min(found, default=0) < 0:
        raise UserError(f"seeds={seeds}: expected whole numbers from 0 on")
    return found


def _slices(count: int, size: int) -> list[slice]:
    """Consecutive parts of so many images, of a size each but the last."""
    return [slice(start, min(count, start + size)) for start in range(0, count, size)]


def _kept_tokens(generators: Sequence[torch.Generator], tokens: int, device: torch.device, drop: float) -> Tensor:
    """Draw the tokens of each image that skip no block, int64 [B, K], on the CPU as noise is."""
    return kept_tokens(torch.stack([torch.rand(tokens, generator=each) for each in generators]), drop).to(device)


def noise_of(indices: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise float32 [B, *shape], drawn on the CPU and therefore equal for all devices and batches."""
    return torch.stack([torch.randn(*shape, generator=torch_generator(seed, "sample", index)) for index in indices])


def spherical(first: Tensor, last: Tensor, weights: Tensor) -> Tensor:
    """Interpolate between two tensors along the great circle, so that noise keeps its norm; the ends are exact.

    Args:
        first: floating-point [...], of any shape.
        last: the same.
        weights: [N] in [0, 1], 0 for the first.

    Returns:
        [N, ...]; the straight line where the two have one direction.
    """
    cosine = torch.nn.functional.cosine_similarity(first.flatten().double(), last.flatten().double(), dim=0)
    angle = cosine.clamp(-1, 1).acos()
    parts = torch.stack([1 - weights, weights]).double()
    if angle.sin() > _LEAST_SINE:
        parts = (parts * angle).sin() / angle.sin()
    shape = (-1, *[1] * first.ndim)
    before, after = parts.to(first.dtype)
    return before.reshape(shape) * first + after.reshape(shape) * last
