"""Sizes of the outputs and FLOPs of operators, asked of torch once for each kind of inputs."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_DEVICE_OF = torch.ops.prim.device.default


class _Layout(NamedTuple):
    """A tensor without memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    """The CPU, or the meta device, to which forward mode moves tensors where it adds to a tangent of zero."""


class _Output(NamedTuple):
    """An output of an operator."""

    layout: _Layout
    offset: int
    """Offset of a view in the storage of its input, elements."""


class _Outcome(NamedTuple):
    """Outputs and FLOPs of an operator for one kind of inputs."""

    outputs: tuple[_Output | None, ...]
    """None where there is none."""
    join: Callable[[list[Tensor | None]], Any]
    """Makes what the operator returns of its outputs."""
    flops: int


class RememberedOperators(TorchDispatchMode):
    """Operators on fake tensors, remembered by their inputs, and the sum of their FLOPs.

    Blocks of a network are alike, and so are passes through it. Of each operator torch finds out in Python, in up to
    milliseconds, what comes out; here it does so once for the same shapes, strides, dtypes and other arguments.
    Operators that write to their inputs are left to it.

    Args:
        fakes: the mode of the tensors.
    """

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes, self.flops = fakes, 0
        self._known: dict[Any, _Outcome] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator, or make the outputs that it is known to have."""
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):  # asked for more often than all others are called
            return args[0].fake_device
        kwargs = kwargs or {}
        base = args[0] if args and _returns_views(func) else None
        if func._schema.is_mutable or (base is not None and not _is_plain(base)):
            return func(*args, **kwargs)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        known = self._known.get(key)
        if known is not None:
            self.flops += known.flops
            return known.join([None if output is None else self._make(output, base) for output in known.outputs])
        out = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=out)
        self.flops += flops
        several = isinstance(out, (tuple, list))
        outputs = out if several else (out,)
        if all(output is None or _is_plain(output) for output in outputs):
            start = 0 if base is None else base.storage_offset()
            found = tuple(
                None if each is None else _Output(_layout(each), each.storage_offset() - start) for each in outputs
            )
            self._known[key] = _Outcome(found, type(out) if several else _only, flops)
        return out

    def _make(self, output: _Output, base: Tensor | None) -> Tensor:
        (shape, stride, dtype, device), offset = output
        with no_dispatch():
            if base is None:
                made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                made = torch.empty(0, dtype=dtype, device="meta")
                made.set_(base.untyped_storage(), base.storage_offset() + offset, shape, stride)
        return FakeTensor(self.fakes, made, device)


@cache
def _returns_views(operator: Any) -> bool:
    return any(returned.alias_info is not None for returned in operator._schema.returns)


def _is_plain(value: Any) -> bool:
    """Return whether a value is a fake tensor whose elements nobody knows; those of a tangent of zero are known."""
    return isinstance(value, FakeTensor) and value.constant is None and not value._is_zerotensor()


def _layout(tensor: Tensor) -> _Layout:
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype, device)


def _key(value: Any) -> Any:
    """Hashable form of arguments; 1, 1.0 and True, which are equal, differ in the dtype of what comes out."""
    if isinstance(value, Tensor):
        return _layout(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    return type(value), value


def _only(outputs: list[Tensor | None]) -> Tensor | None:
    return outputs[0]
