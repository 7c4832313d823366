"""Configurations that come with the package, by name: `quickstart`, `imagenet/f16d32`, `sweeps/tiny`."""

from pathlib import Path

from vavae.errors import UserError

_PACKAGE = Path(__file__).parents[1]
PRESETS = next(filter(Path.is_dir, [_PACKAGE / "presets", _PACKAGE.parent / "configs"]), _PACKAGE / "presets")
"""Folder of these configurations: in the package where it is installed, `configs/` in a checkout."""
_SUFFIXES = {".yaml", ".yml"}
_PARTS = "presets"
"""Folder of what other configurations inherit from."""


def is_preset(name: str | Path) -> bool:
    """Return whether a configuration is named by its name; a file of this name goes before."""
    return Path(name).suffix not in _SUFFIXES and not Path(name).is_file()


def find_config(name: str | Path) -> Path:
    """Find the file of a configuration.

    Args:
        name: a path, or the name of a configuration that comes with the package.

    Raises:
        UserError: there is no such file, and none of this name.
    """
    if not is_preset(name):
        return Path(name)
    names = preset_names()
    if str(name) in names:
        return PRESETS / f"{name}.yaml"
    if Path(name).exists():
        return Path(name)  # a folder, which whoever reads it refuses
    raise UserError(f"{name}: no such file, and no configuration of the package; those are {', '.join(names)}")


def preset_names() -> list[str]:
    """Sorted names of the configurations that come with the package."""
    paths = (path.relative_to(PRESETS).with_suffix("") for path in PRESETS.rglob("*.yaml"))
    return sorted(path.as_posix() for path in paths if path.parts[0] != _PARTS)
