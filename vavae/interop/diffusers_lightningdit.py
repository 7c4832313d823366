"""The LightningDiT as a folder that diffusers loads with the code in it, and such folders as LightningDiTs."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from safetensors.torch import save_file

from vavae.config import Config, identity
from vavae.errors import UserError
from vavae.interop.checkpoint_file import WeightsFile
from vavae.interop.conversion import Conversion
from vavae.interop.diffusers_tokenizer import CONFIG, WEIGHTS, NotInDiffusersError, read_tensors
from vavae.interop.standalone import standalone_source
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.storage.storage import Storage

TRANSFORMER, TRANSFORMER_CLASS = "lightningdit_transformer", "LightningDiTTransformer2DModel"
"""Module of the folder, and its class. Diffusers loads all local modules into one place: no other may have the name."""
_PREFIX = "network."
"""Prefix of the names of the weights."""
_SWITCHES = ("patch_size", "classes", "qk_norm", "mlp", "norm", "rope", "shift", "prediction")
"""Fields of a LightningDiT's configuration that the exported network has, besides its shape."""
_UNSUPPORTED = {
    "intermediate_head": None,
    "head": None,
    "average_velocity": False,
    "guidance_inputs": False,
    "conditioning": "adaln",
    "class_token": None,
}
"""Fields that the exported network lacks, with the value at which that makes no difference."""


def save_diffusers_lightningdit(folder: str, model: LightningDiT) -> None:
    """Write a LightningDiT as a model of diffusers, with its code.

    Args:
        folder: local path or storage URL.
        model: the LightningDiT.

    Raises:
        UserError: it has parts that such a folder has no code for.
    """
    config, storage, remedy = model.config, Storage(folder), "take the run's own export"
    refuse_unsupported(config, _UNSUPPORTED, "lightningdit", folder, remedy)
    if config.routing is not None:
        refuse_unsupported(config.routing, {"fuse": None}, "lightningdit.routing", folder, remedy)
    with storage.create(WEIGHTS) as local:
        state = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, local, metadata={"format": "pt"})
    write_code(storage, f"{TRANSFORMER}.py")
    auto_map = {"AutoModel": f"{TRANSFORMER}.{TRANSFORMER_CLASS}"}
    settings = _settings(config, model.latent_dim, model.grid)
    storage.write_json(CONFIG, {"_class_name": TRANSFORMER_CLASS, "auto_map": auto_map, **settings})


def load_diffusers_lightningdit(
    folder: Storage, config: LightningDiTConfig, latent_dim: int, grid: tuple[int, int]
) -> tuple[LightningDiT, WeightsFile]:
    """Read a folder of :func:`save_diffusers_lightningdit`; no code of it is run.

    Args:
        folder: the folder.
        config: what the LightningDiT has to be, with its number of classes.
        latent_dim: channels of the latents that it is for.
        grid: their height and width.

    Returns:
        The model in training mode, its tensors bitwise those of the files; and the files.

    Raises:
        UserError: another class of model, other sizes or switches, or missing or damaged files.
    """
    url = folder.url(CONFIG)
    try:
        stored = folder.read_json(CONFIG)
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; give a folder that vavae export writes for diffusers") from None
    kind = stored.get("_class_name") if isinstance(stored, dict) else None
    if kind != TRANSFORMER_CLASS:
        raise UserError(f"{url}: a model of the class {kind}; expected {TRANSFORMER_CLASS}, as vavae export writes it")
    for name, value in identity(_settings(config, latent_dim, grid)).items():
        if stored.get(name) != value:
            raise UserError(
                f"{url}: its {name} is {json.dumps(stored.get(name))}, but the run's is {json.dumps(value)}: set "
                f"lightningdit.{name}, or the latents, to it"
            )
    weights = read_network(folder)
    values = {**config.model_dump(), "latent_dim": latent_dim, "grid": grid}
    return Conversion(LightningDiTConfig, LightningDiT, lambda *_: values).load(weights, {}), weights


def read_network(folder: Storage) -> WeightsFile:
    """Read the weights in a folder of :func:`save_diffusers_lightningdit`, by their names in the class that trains."""
    found = read_tensors(folder)
    return WeightsFile(
        found.url,
        {name.removeprefix(_PREFIX): tensor for name, tensor in found.tensors.items()},
        {name.removeprefix(_PREFIX): name for name in found.tensors},
    )


def refuse_unsupported(config: Config, neutral: Mapping[str, Any], section: str, folder: str, remedy: str) -> None:
    """Raise a NotInDiffusersError for the first field that a folder of diffusers can't express.

    Args:
        config: the section of the configuration.
        neutral: fields that such a folder lacks, with the values at which that makes no difference.
        section: the section's dotted path.
        folder: the folder.
        remedy: what to do; `{neutral}` in it stands for the value.
    """
    for name, value in neutral.items():
        if getattr(config, name) != value:
            written = "null" if value is None else str(value).lower()
            raise NotInDiffusersError(f"{folder}: no {section}.{name} in diffusers: {remedy.format(neutral=written)}")


def write_code(storage: Storage, path: str) -> None:
    """Write a module of a folder by the name of ours, with all that it needs of this package."""
    source = standalone_source(f"{__package__}.pipeline.{PurePosixPath(path).stem}")
    storage.write_bytes(path, source.encode())


def _settings(config: LightningDiTConfig, latent_dim: int, grid: tuple[int, int]) -> dict[str, Any]:
    switches = {name: getattr(config, name) for name in _SWITCHES}
    return {"latent_dim": latent_dim, "grid": grid, **config.shape._asdict(), **switches}
