"""LightningDiT (arXiv 2501.01423) as a model of diffusers; needs torch and diffusers alone.

Time runs from noise (t = 0) to data (t = 1).
"""

import os
import shutil
from dataclasses import dataclass
from typing import Any, cast

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from vavae.models.dit.config import TransformerShape
from vavae.models.dit.model import LightningDiT


@dataclass(frozen=True)
class LightningDiTSettings:
    """The settings that the network reads: those of this file's models, and None or False for parts they never have."""

    shape: TransformerShape
    patch_size: int
    classes: int
    qk_norm: bool
    mlp: str
    norm: str
    rope: bool
    shift: bool
    predicts_data: bool
    intermediate_head: None = None
    head: None = None
    class_token: None = None
    routing: None = None
    in_context: bool = False
    average_velocity: bool = False
    guidance_inputs: bool = False
    checkpoint_activations: bool = False

    @property
    def head_blocks(self) -> "LightningDiTSettings":
        """Settings of the output layer: there is no head of another width."""
        return self


class LightningDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """The velocity of latents, data - noise, under a class label.

    Args:
        latent_dim: channels C of a latent.
        grid: height H and width W of a latent.
        depth: number of blocks.
        width: channels of a token.
        heads: attention heads of a block.
        patch_size: side of the square of latent positions that makes one token.
        classes: number of labels; label `classes` stands for none.
        qk_norm: normalize queries and keys per head.
        mlp: feed-forward layer, `swiglu` or `gelu`.
        norm: normalization of tokens, `rmsnorm` or `layernorm`.
        rope: rotate queries and keys by row and column.
        shift: let the adaptive layer norms shift, too.
        prediction: output of the network, `velocity`, or `data`, from which the velocity follows.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012
    _auto_class = "AutoModel"

    @register_to_config
    def __init__(
        self,
        latent_dim: int,
        grid: tuple[int, int],
        depth: int,
        width: int,
        heads: int,
        patch_size: int,
        classes: int,
        qk_norm: bool,
        mlp: str,
        norm: str,
        rope: bool,
        shift: bool,
        prediction: str,
    ) -> None:
        super().__init__()
        settings = LightningDiTSettings(
            TransformerShape(depth, width, heads),
            patch_size,
            classes,
            qk_norm,
            mlp,
            norm,
            rope,
            shift,
            prediction == "data",
        )
        height, column_count = grid
        self.network = LightningDiT(cast(Any, settings), latent_dim, (height, column_count))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity [B, C, H, W], in the dtype of the latents.

        Args:
            hidden_states: noisy normalized latents [B, C, H, W].
            timestep: times [B] in [0, 1], 0 noise and 1 data; below 1 for a model that predicts the data.
            class_labels: int64 [B] in [0, classes]; `classes` asks for the unconditional velocity.
            return_dict: give an output of diffusers, whose `sample` it is; else a tuple of it alone.
        """
        velocity = self.network(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """Split a configuration as the base class does, which warns of `auto_map`, though it writes that itself."""
        return super().extract_init_dict({key: config_dict[key] for key in config_dict if key != "auto_map"}, **kwargs)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, and this file beside it, without which nobody could load the model."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        shutil.copy(__file__, save_directory)
