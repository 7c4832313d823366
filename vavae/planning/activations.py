"""Bytes that the backward pass needs of the forward pass, counted on tensors without memory."""

from collections import Counter

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vavae.distributed.config import Precision
from vavae.runs.config import RunConfig
from vavae.runs.jobs import Job
from vavae.training.flops.flops import over_depth, with_drop
from vavae.training.flops.meta_models import MetaModel, lightningdit_step, tokenizer_step


class _SavedBytes:
    """Bytes of the tensors that autograd graphs hold, parameters left out: now, and at most."""

    def __init__(self, model: MetaModel) -> None:
        self._free = {_storage(t) for module in model.modules for t in (*module.parameters(), *module.buffers())}
        self._holders: Counter[int] = Counter()
        self._now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key not in self._free:
            self._holders[key] += 1
            if self._holders[key] == 1:
                self._now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self._now)

    def release(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key not in self._free:
            self._holders[key] -= 1
            if not self._holders[key]:
                self._now -= tensor.untyped_storage().nbytes()


class _SavedTensor:
    """Tensor that counts as saved for as long as a graph holds it."""

    def __init__(self, tensor: Tensor, saved: _SavedBytes) -> None:
        self.tensor, self._saved = tensor, saved
        saved.add(tensor)

    def __del__(self) -> None:
        self._saved.release(self.tensor)


def activation_bytes(config: RunConfig, job: Job, images: int) -> int:
    """Peak bytes held for the backward pass of a micro-batch, nothing recomputed, in eager mode.

    For the tokenizer it is its first phase, with the adversary if there is one in any; for the LightningDiT the end,
    when the fewest tokens skip blocks.

    Args:
        config: of the run.
        job: the training.
        images: in the micro-batch.
    """
    if job == "train_lightningdit":
        training, routing = config.train_lightningdit, config.lightningdit.routing
        drop = 0.0 if routing is None else routing.drop_at(training.images - 1)
        return over_depth(
            with_drop(config, drop),
            lambda shallow: saved_bytes(lightningdit_step(shallow, images), training.precision),
        )
    phase = config.tokenizer_phases()[0]
    step = tokenizer_step(config, phase, images, adversary=config.adversarial, measure_weights=True)
    return saved_bytes(step, config.train_vavae.precision)


def saved_bytes(model: MetaModel, precision: Precision) -> int:
    """Peak bytes that the graphs of some work hold."""
    with model.ready() as step:
        saved = _SavedBytes(model)
        # As the engines set it.
        half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        with half, saved_tensors_hooks(lambda tensor: _SavedTensor(tensor, saved), lambda held: held.tensor):
            step()
    return saved.peak


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
