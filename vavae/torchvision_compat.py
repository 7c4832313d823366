"""Make torchvision importable beside a CPU build of torch; import this before timm or torchmetrics.

The package index carries torchvision for CUDA only. Beside a CPU torch its compiled operators are not registered, and
``import torchvision`` dies while it attaches their shape functions. Declaring the two schemas that it looks for is
enough: everything written in Python (models, transforms) then works, the compiled operators stay unavailable.
Nothing happens where torchvision imports by itself.
"""

import importlib
import sys

import torch

import vavae.matplotlib_compat  # noqa: F401  (torchmetrics imports matplotlib)

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declarations: list[torch.library.Library] = []
"""Libraries that hold the declarations, which vanish with them."""


def _declare_missing_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + _SCHEMA)
    _declarations.append(library)


try:
    importlib.import_module("torchvision")
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_missing_operators()
    importlib.import_module("torchvision")
