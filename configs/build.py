"""Build of the package with the configurations of this folder as `vavae/presets`, as `pyproject.toml` asks for."""

from pathlib import Path

from setuptools.command.build_py import build_py

_CONFIGS = Path("configs")
_THIS = "configs/build.py"


class BuildWithPresets(build_py):
    """Build of the package with its configurations; an editable installation has them where they are."""

    def run(self) -> None:
        """Copy the modules, and then the configurations."""
        super().run()
        if not self.editable_mode:
            for source, target in self._presets().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """All files of the build."""
        return [*super().get_outputs(include_bytecode), *self._presets().values()]

    def get_source_files(self) -> list[str]:
        """All files that the build is made of, which belong into a source distribution."""
        return [*super().get_source_files(), *self._presets(), _THIS]

    def _presets(self) -> dict[str, str]:
        folder = Path(self.build_lib, "vavae", "presets")
        return {str(path): str(folder / path.relative_to(_CONFIGS)) for path in sorted(_CONFIGS.rglob("*.yaml"))}
