"""A run as the folder that goes to the hub: models with their configuration, and records that make it a run again.

The weights are there once. Where diffusers has a like of all parts, they are in its layout, and the folder is one of
its pipelines, too; else they are in ours.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from vavae.config import dump, without_own_folders
from vavae.errors import UserError
from vavae.interop.diffusers_pipeline import save_diffusers_pipeline
from vavae.interop.diffusers_tokenizer import CONFIG as CONFIG_OF_DIFFUSERS
from vavae.interop.diffusers_tokenizer import WEIGHTS as DIFFUSERS_WEIGHTS
from vavae.interop.diffusers_tokenizer import NotInDiffusersError
from vavae.interop.export import DESCRIPTION, WEIGHTS, load_exported_tokenizer, load_latent_models
from vavae.interop.import_export import export_diffusers_tokenizer
from vavae.latents.manifest import MANIFEST, read_latent_manifest
from vavae.latents.statistics import STATISTICS
from vavae.runs.files import CONFIG
from vavae.runs.push_inputs import PushInputs
from vavae.runs.run import PUBLISHED, StoredArtifact
from vavae.storage.artifact import FileInfo, commit
from vavae.storage.storage import Storage, sha256_of


@dataclass(frozen=True)
class PushedFolder:
    """A folder that is ready to be uploaded."""

    path: Path
    weights: Mapping[str, str]
    """SHA-256 of each file of weights by its path in the folder."""
    not_in_diffusers: str
    """Reason why diffusers can't read it; empty where it can."""

    def files(self) -> Iterator[tuple[str, int]]:
        """Yield path and size in bytes of each file, in order."""
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                yield str(path.relative_to(self.path)), path.stat().st_size


def write_pushed_folder(inputs: PushInputs, folder: Path) -> PushedFolder:
    """Write what of a run goes to the hub, besides the model card.

    Args:
        inputs: those of the run.
        folder: a local folder, empty or not there yet.

    Raises:
        UserError: there is something in the folder, or the models are damaged or do not belong together.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something already: name an empty folder, or one that is not there yet")
    folder.mkdir(parents=True, exist_ok=True)
    reason = _write_models(inputs, folder)
    place = Storage(str(folder))
    if inputs.latents is not None:
        _write_latents(inputs.latents, place.child(inputs.latents_prefix))
    weights: dict[str, str] = {}
    for prefix, record in inputs.records.items():
        files = {
            name: FileInfo(bytes=size, sha256=sha256_of(folder / prefix / name))
            for name, size in place.child(prefix).sizes().items()
            if name != CONFIG_OF_DIFFUSERS and not name.endswith(".py")  # which one may edit
        }
        weights |= {f"{prefix}/{name}": info.sha256 for name, info in files.items() if name.endswith(".safetensors")}
        commit(
            place, prefix, record.model_copy(update={"files": files, "details": without_own_folders(record.details)})
        )
    for name in inputs.files:
        place.write_bytes(name, inputs.storage.read_bytes(name))
    place.write_bytes(CONFIG, dump(inputs.config).encode())
    return PushedFolder(folder, weights, reason)


def _write_models(inputs: PushInputs, folder: Path) -> str:
    """Write the models, in the layout of diffusers where it has a like of them; else return what it has none of."""
    exports = {PUBLISHED["train_vavae"]: inputs.tokenizer}
    if inputs.sampling is not None:
        exports[PUBLISHED["train_lightningdit"]] = inputs.sampling.lightningdit
    reason = ""
    try:
        if inputs.sampling is not None:
            save_diffusers_pipeline(inputs.sampling, str(folder))
        else:
            if inputs.config.tokenizer.kind != "kl":
                raise NotInDiffusersError(f"no tokenizer.kind={inputs.config.tokenizer.kind} in diffusers")
            size = inputs.config.shards.image_size
            export_diffusers_tokenizer(inputs.tokenizer, inputs.latents, size, str(folder / PUBLISHED["train_vavae"]))
    except NotInDiffusersError as error:
        reason = str(error).removeprefix(f"{folder}/").removeprefix(f"{folder}: ")
        for path in folder.iterdir():  # those before the one that diffusers has no like of
            shutil.rmtree(path)
        # Which checks them.
        if inputs.sampling is not None:
            load_latent_models(inputs.sampling)
        else:
            load_exported_tokenizer(inputs.tokenizer.folder, encodes=False)
    for prefix, export in exports.items():
        target = Storage(str(folder / prefix))
        in_diffusers = target.is_file(DIFFUSERS_WEIGHTS)
        for name in export.files:
            if name == DESCRIPTION:
                description = without_own_folders(yaml.safe_load(export.folder.read_bytes(name)))
                target.write_bytes(name, yaml.safe_dump(description, sort_keys=False).encode())
            elif name != WEIGHTS or not in_diffusers:
                target.put_file(export.folder.local_file(name), name)
    return reason


def _write_latents(latents: StoredArtifact, target: Storage) -> None:
    """Write what samples need of the latents: their statistics, and the names of the classes."""
    manifest = read_latent_manifest(latents.folder).model_copy(update={"splits": {}})
    target.write_json(MANIFEST, manifest.to_json())
    target.put_file(latents.folder.local_file(STATISTICS), STATISTICS)
