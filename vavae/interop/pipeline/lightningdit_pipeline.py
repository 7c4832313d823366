"""Images of classes by a LightningDiT (arXiv 2501.01423), as a pipeline of diffusers."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class LightningDiTPipeline(DiffusionPipeline):
    """From noise to images: transformer, scheduler and guidance, statistics of the latents, decoder.

    Args:
        vae: the tokenizer; `latents_mean`, `latents_std` and `scaling_factor` of its configuration lead to its latents.
        transformer: velocity of latents, data - noise, at times from 0 (noise) to 1 (data).
        scheduler: steps along the path, in the conventions of `FlowMatchEulerDiscreteScheduler`.
        id2label: name of each class by its number; None for images without classes.
        num_inference_steps: steps of the scheduler, by default.
        guidance_scale: scale w in v_null + w (v_label - v_null), by default; 1 is no guidance.
        guidance_low: lowest time that is guided, by default.
        guidance_high: highest time that is guided, by default.
        guidance_channels: guide that many first channels of a latent, by default; None guides all.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        guidance_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            id2label=id2label,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_low=guidance_low,
            guidance_high=guidance_high,
            guidance_channels=guidance_channels,
        )
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Look up the numbers of classes by their names; ValueError where there is no such class."""
        names = [label] if isinstance(label, str) else label
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise ValueError(f"no class {unknown[0]!r}; there are {', '.join(self.labels) or 'none'}")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        latents: Tensor | None = None,
        batch_size: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images. What is None is taken from the pipeline's configuration.

        Args:
            class_labels: number or name of each image's class; None: `batch_size` images of no class.
            guidance_scale: scale w in v_null + w (v_label - v_null); 1 is no guidance.
            guidance_interval: times low <= t <= high that are guided, from 0 (noise) to 1 (data).
            guidance_channels: guide that many first channels of a latent.
            generator: draws the noise; one for all images, or one for each.
            num_inference_steps: steps of the scheduler.
            latents: the noise itself, [B, C, H, W].
            batch_size: number of images, where they have no classes.
            output_type: `pil` for images, `np` for an array [B, H, W, C] in [0, 1], `pt` for a tensor [B, C, H, W] in
                [0, 1], `latent` for normalized latents [B, C, H, W].
            return_dict: give an output of diffusers, whose `images` they are; else a tuple of them.
        """
        network, device = self.transformer.config, self._execution_device
        labels = self._label_numbers(class_labels, batch_size)
        shape = (len(labels), network.latent_dim, *network.grid)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents {list(latents.shape)}, expected {list(shape)} for {len(labels)} images")
        x, y = latents.to(device, torch.float32), torch.tensor(labels, device=device)
        low, high = guidance_interval or (self.config.guidance_low, self.config.guidance_high)
        low, high = torch.tensor([low, high]).tolist()  # in float32, as the times are
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        channels = guidance_channels or self.config.guidance_channels
        self.scheduler.set_timesteps(num_inference_steps or self.config.num_inference_steps, device=device)
        sigmas = self.scheduler.timesteps.cpu().double() / self.scheduler.config.num_train_timesteps
        times = (1 - sigmas).float().tolist()
        for timestep, t in self.progress_bar([*zip(self.scheduler.timesteps, times, strict=True)]):
            velocity = self._velocity(x, t, y, scale if low <= t <= high else 1.0, channels)
            x = self.scheduler.step(-velocity, timestep, x).prev_sample
        images = x if output_type == "latent" else self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _label_numbers(self, class_labels: int | str | Sequence[int | str] | None, batch_size: int) -> list[int]:
        """Number of each image's class; ValueError where there is none."""
        classes = self.transformer.config.classes
        if class_labels is None:
            return [classes] * batch_size
        labels = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        numbers = [self.get_label_ids(label)[0] if isinstance(label, str) else int(label) for label in labels]
        wrong = [number for number in numbers if not 0 <= number <= classes]
        if wrong:
            raise ValueError(f"no class {wrong[0]}; there are {classes}, and {classes} stands for none")
        return numbers

    def _velocity(self, x: Tensor, t: float, y: Tensor, scale: float, channels: int | None) -> Tensor:
        """Velocity [B, C, H, W] of latents [B, C, H, W] at a time, under guidance."""
        if scale == 1:
            return self.transformer(x, torch.full((len(x),), t, device=x.device), y).sample
        both, null = torch.cat([x, x]), torch.full_like(y, self.transformer.config.classes)
        times = torch.full((len(both),), t, device=x.device)
        velocity, v_null = self.transformer(both, times, torch.cat([y, null])).sample.chunk(2)
        guided, v_null = velocity[:, :channels], v_null[:, :channels]
        return torch.cat([v_null + scale * (guided - v_null), velocity[:, guided.shape[1] :]], dim=1)

    def _images(self, x: Tensor, output_type: str) -> Any:
        """Decode normalized latents [B, C, H, W]."""
        settings = self.vae.config
        mean = torch.tensor(settings.latents_mean or settings.shift_factor or 0.0, device=x.device).view(-1, 1, 1)
        std = torch.tensor(settings.latents_std or 1.0, device=x.device).view(-1, 1, 1) / settings.scaling_factor
        z = x * std + mean
        decoded = self.vae.decode(z.to(self.vae.dtype)).sample.float()
        pixels = (decoded / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration with the names of the files in the folder, and this file, without which it is none."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        shutil.copy(__file__, save_directory)
        path = Path(save_directory, self.config_name)
        index = json.loads(path.read_text(encoding="utf-8"))
        index["_class_name"] = [Path(__file__).stem, index["_class_name"]]
        for name in self.components:
            library, kind = index[name]
            index[name] = [library.rpartition(".")[2], kind]  # a module of the folder, not of this process
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
