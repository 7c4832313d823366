"""From the tensors of a released file to the class that trains: the tensors determine the sizes, and none may be
missing, left over or of another shape.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vavae.config import Config, identity
from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.interop.checkpoint_file import WeightsFile

ConfigT = TypeVar("ConfigT", bound=Config)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Conversion(Generic[ConfigT, ModuleT]):
    """Conversion between a class of model and its released files."""

    config: type[ConfigT]
    build: Callable[..., ModuleT]
    """The class: takes a configuration and, by name, the sizes that are not fields of it."""
    infer: Callable[[WeightsFile, Mapping[str, Any]], dict[str, Any]]
    """Infers fields of the configuration and further sizes from the tensors, given the overrides."""
    released: str = ""
    """Prefix of the released names, in place of `ours`."""
    ours: str = ""
    """Prefix of the names in the class."""

    def load(self, weights: WeightsFile, overrides: Mapping[str, Any], section: str = "") -> ModuleT:
        """Load the model of a file, in training mode with gradients on, its tensors in the dtype of the file.

        Args:
            weights: the file, with this model alone below `released`.
            overrides: fields and sizes that replace the inferred ones.
            section: prefix of the names of the overrides in messages.

        Raises:
            UserError: a tensor is missing, left over, not finite, or of another shape than the others and the overrides
                demand; or an override does not exist or has no valid value.
        """
        inferred = self.infer(weights, overrides)
        values = {**inferred, **overrides}
        sizes = {name: values.pop(name) for name in inferred if name not in self.config.model_fields}
        config = self._configure(weights.url, values, section)
        with torch.device("meta"):  # for the shapes alone
            module = self.build(config, **sizes)
        released = weights.part(self.released).tensors
        found = {self.ours + name.removeprefix(self.released): tensor for name, tensor in released.items()}
        problems = list(self._problems(found, module.state_dict(), weights.stored_names))
        if problems:
            asked = [
                f"{'' if name in sizes else section}{name}={overrides[name]}"
                for name, value in inferred.items()
                if identity(overrides.get(name, value)) != identity(value)
            ]
            demand = f"with {', '.join(asked)}: correct that or take another file" if asked else "by the other tensors"
            count = f" (the first of {len(problems)} such tensors)" if len(problems) > 1 else ""
            raise UserError(f"{weights.url}: {problems[0]} {demand}{count}")
        stored = {weights.stored_names.get(name, name): tensor for name, tensor in released.items()}
        require_finite(stored, weights.url, "take another file or checkpoint")
        # Tensors that are mapped from a file would change with the file.
        owned = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}
        module.load_state_dict(owned, assign=True)
        return module

    def state(self, module: ModuleT) -> dict[str, Tensor]:
        """Tensors of a model by their released names."""
        return {self._released(name): tensor for name, tensor in module.state_dict().items()}

    def _configure(self, url: str, values: Mapping[str, Any], section: str) -> ConfigT:
        try:
            return self.config.model_validate(values)
        except ValidationError as error:
            reason = error.errors()[0]
            if reason["type"] == "extra_forbidden":
                known = ", ".join(self.config.model_fields)
                raise UserError(f"{url}: no setting {section}{reason['loc'][0]}; there are {known}") from error
            place = section + ".".join(map(str, reason["loc"])) + ": " if reason["loc"] else ""
            raise UserError(f"{url}: {place}{reason['msg'].removeprefix('Value error, ')}") from error

    def _released(self, name: str) -> str:
        return self.released + name.removeprefix(self.ours)

    def _problems(
        self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], stored_names: Mapping[str, str]
    ) -> Iterator[str]:
        """One message for each tensor that is not as expected."""
        names = {own: self._released(own) for own in [*expected, *found]}
        names = {own: stored_names.get(released, released) for own, released in names.items()}
        for own, tensor in expected.items():
            name, shape = names[own], list(tensor.shape)
            if own not in found:
                yield f"no tensor {name}, expected {shape}"
            elif list(found[own].shape) != shape:
                yield f"{name} is {list(found[own].shape)}, expected {shape}"
            elif found[own].is_floating_point() != tensor.is_floating_point():
                yield f"{name} holds {found[own].dtype}, expected {tensor.dtype}"
        for own in found:
            if own not in expected:
                yield f"{names[own]} is {list(found[own].shape)}, expected no such tensor"
