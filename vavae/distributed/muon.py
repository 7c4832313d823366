"""Muon: steps along orthogonalized momentum for weights that are matrices, beside AdamW for all others.

Formula, keys and sources: `vavae/diffusion/README.md`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from vavae.distributed.config import MuonConfig
from vavae.distributed.world import World
from vavae.errors import UserError

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of the polynomial a x + b x³ + c x⁵ that iterations apply to singular values."""
_EPS = 1e-7
"""Least norm by which a matrix is divided."""
MOMENTUM = "momentum_buffer"
"""Key of Muon's only moment, as in `torch.optim.Muon`."""


class MatrixShape(NamedTuple):
    """A weight as Muon sees it: a stack of equal matrices."""

    parts: int
    """Matrices that are fused, one below the other."""
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self)

    def flops(self, iterations: int) -> int:
        """FLOPs of orthogonalizing it: in each iteration A = X Xᵀ, A A and A X, of the shorter side."""
        short, long = sorted((self.rows, self.columns))
        return self.parts * iterations * (4 * short * short * long + 2 * short**3)


def matrix_shapes(shapes: Mapping[str, Size], config: MuonConfig) -> dict[str, MatrixShape]:
    """Choose the weights that Muon updates; vectors are never among them.

    Args:
        shapes: of all trained weights by name.
        config: with the patterns.

    Returns:
        The weights by name.

    Raises:
        UserError: the patterns do not say what becomes of a weight with rows and columns, or say both.
    """
    found = {}
    for name, shape in shapes.items():
        if len(shape) < 2:
            continue
        groups = {group: getattr(config, group) for group in ("matrices", "others")}
        matching = [group for group, patterns in groups.items() if any(fnmatchcase(name, each) for each in patterns)]
        if len(matching) != 1:
            raise UserError(
                f"optimizer.muon: {name} {[*shape]} matches {'both' if matching else 'neither'} matrices="
                f"{[*config.matrices]} {'and' if matching else 'nor'} others={[*config.others]}: let one of them"
            )
        if matching == ["matrices"]:
            parts = next((parts for pattern, parts in config.fused.items() if fnmatchcase(name, pattern)), 1)
            assert shape[0] % parts == 0, f"{name}: {shape[0]} rows do not hold {parts} matrices"
            found[name] = MatrixShape(parts, shape[0] // parts, shape[1:].numel())
    return found


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Bring the singular values of matrices [n, rows, columns] near one by Newton-Schulz iterations, in their dtype.

    After five iterations those that were at least 1 % of the matrix's norm lie between 0.68 and 1.14.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_update(gradient: Tensor, momentum: Tensor, config: MuonConfig, shape: MatrixShape) -> Tensor:
    """Orthogonalize the momentum of a weight; the step goes against it.

    Args:
        gradient: of the weight, with its shape.
        momentum: mean of gradients with this one, likewise.
        config: how it is done.
        shape: how the weight is split.

    Returns:
        The update before `update_scale`, with the shape of the weight; bfloat16 with `precision` bf16.
    """
    direction = gradient.lerp(momentum, config.momentum) if config.nesterov else momentum
    matrices = direction.reshape(shape)
    x = orthogonalize(matrices.bfloat16() if config.precision == "bf16" else matrices, config.iterations)
    return x.reshape(gradient.shape)


def update_scale(shape: MatrixShape, config: MuonConfig) -> float:
    """Factor of an update, see `MuonConfig.scale`; weight decay goes without it."""
    spectral = math.sqrt(max(1.0, shape.rows / shape.columns))
    like_adamw = 0.2 * math.sqrt(max(shape.rows, shape.columns))
    return {"original": spectral, "match_rms_adamw": like_adamw, "internal_guidance": spectral * like_adamw}[
        config.scale
    ]


def assign_by_cost(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Assign tasks to ranks, the most expensive first, each to the rank that has least to do.

    Returns:
        Indices of the tasks of each rank, in the order of falling costs.
    """
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = loads.index(min(loads))
        assigned[rank].append(index)
        loads[rank] += costs[index]
    return assigned


def _into_buckets(assigned: Sequence[Sequence[int]], sizes: Sequence[int], most: int) -> list[list[list[int]]]:
    """Divide the tasks of ranks into buckets, each with a part of every rank, of at most so many values together.

    A task that is larger than a rank's part is one of its own.
    """
    queues = [deque(indices) for indices in assigned]
    buckets = []
    while any(queues):
        bucket: list[list[int]] = [[] for _ in queues]
        for part, queue in zip(bucket, queues, strict=True):
            while queue and (not part or sum(sizes[i] for i in [*part, queue[0]]) <= most // len(queues)):
                part.append(queue.popleft())
        buckets.append(bucket)
    return buckets


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices and an AdamW for all other weights. Every rank has averaged gradients and all moments.

    Whole matrices are assigned to ranks by the cost of orthogonalizing them, so that none is orthogonalized twice.
    Where `found_inf` is not zero a step changes nothing, as with a fused AdamW; no host waits to find that out.

    Args:
        parameters: trained weights by name, in the same order on every rank.
        shapes: those that are matrices, see `matrix_shapes`.
        config: of Muon.
        adamw: fused, of all other parameters.
        world: the ranks.
        bucket_elements: most values of updates that are exchanged at once.
    """

    found_inf: Tensor
    """Nonzero where a gradient is not finite, float32 []; to be set before a step."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, MatrixShape],
        config: MuonConfig,
        adamw: torch.optim.AdamW,
        world: World,
        bucket_elements: int,
    ) -> None:
        self._config, self._adamw, self._world = config, adamw, world
        self._matrices, self._shapes = [parameters[name] for name in shapes], [*shapes.values()]
        self._scales = [update_scale(shape, config) for shape in self._shapes]
        costs = [shape.flops(config.iterations) for shape in self._shapes]
        sizes = [shape.numel for shape in self._shapes]
        self._buckets = _into_buckets(assign_by_cost(costs, world.size), sizes, bucket_elements)
        lr = adamw.defaults["lr"] * config.learning_rate_factor
        muon = {"params": self._matrices, "lr": lr, "lr_factor": config.learning_rate_factor}
        super().__init__([muon, *adamw.param_groups], {})
        adamw.state = self.state  # one state, as one optimizer has

    def moment_kinds(self, parameter: Tensor, of_adamw: tuple[str, ...]) -> tuple[str, ...]:
        """Keys of the moments of a parameter, given those of AdamW."""
        return (MOMENTUM,) if any(parameter is matrix for matrix in self._matrices) else of_adamw

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all weights; there is no closure."""
        assert closure is None, "gradients are there"
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        applied = 1 - self.found_inf.double()
        self._add_to_momentum(applied)
        rate = self.param_groups[0]["lr"] * applied
        for bucket in self._buckets:
            for index, update in self._exchange(bucket):
                weight = self._matrices[index]
                # An update that is not applied may hold anything.
                step = torch.where(applied > 0, update, 0).to(weight.dtype)
                weight.mul_(1 - rate * self._config.weight_decay)
                weight.sub_(step * (rate * self._scales[index]))

    def _add_to_momentum(self, applied: Tensor) -> None:
        """Add gradients to the momentum of all matrices, and count the update."""
        for matrix in self._matrices:
            state = self.state[matrix]
            if not state:
                state |= {"step": torch.zeros((), device=matrix.device), MOMENTUM: torch.zeros_like(matrix)}
            assert matrix.grad is not None, "a matrix without a gradient"
            state["step"] += applied
            # What is added to a momentum whose step is not applied is nothing, whatever the gradient.
            added = torch.where(applied > 0, matrix.grad, state[MOMENTUM])
            state[MOMENTUM].lerp_(added, 1 - self._config.momentum)

    def _exchange(self, bucket: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
        """Orthogonalize this rank's part of a bucket; yields the updates of all parts."""
        sizes = [[self._shapes[index].numel for index in part] for part in bucket]
        own = [self._update_of(index).flatten() for index in bucket[self._world.rank]]
        longest = max(map(sum, sizes))
        dtype = torch.bfloat16 if self._config.precision == "bf16" else self._matrices[0].dtype
        sent = torch.zeros(longest, dtype=dtype, device=self._world.device)
        if own:
            sent[: sum(map(len, own))] = torch.cat(own)
        for part, lengths, values in zip(bucket, sizes, self._world.all_gather(sent), strict=True):
            for index, update in zip(part, values[: sum(lengths)].split(lengths), strict=True):
                yield index, update.view_as(self._matrices[index])

    def _update_of(self, index: int) -> Tensor:
        matrix = self._matrices[index]
        assert matrix.grad is not None, "a matrix without a gradient"
        momentum = self.state[matrix][MOMENTUM]
        return muon_update(matrix.grad, momentum, self._config, self._shapes[index])
