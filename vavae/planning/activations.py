"""What the backward pass needs of the forward pass, in bytes, counted on tensors without memory."""

from collections import Counter

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vavae.runs.config import RunConfig
from vavae.runs.run import Job
from vavae.training.flops.meta_models import MetaModel, lightningdit_step, tokenizer_step


class _Ledger:
    """Bytes of the tensors that graphs hold, parameters left out: now, and at most."""

    def __init__(self, task: MetaModel) -> None:
        self._free = {_storage(t) for module in task.modules for t in (*module.parameters(), *module.buffers())}
        self._holders: Counter[int] = Counter()
        self._now = self.peak = 0

    def take(self, tensor: Tensor) -> None:
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


class _Held:
    """A tensor for as long as a graph holds it."""

    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        self.tensor, self._ledger = tensor, ledger
        ledger.take(tensor)

    def __del__(self) -> None:
        self._ledger.release(self.tensor)


def activation_bytes(config: RunConfig, job: Job, images: int) -> int:
    """At most held for the backward pass of a micro-batch of so many images, nothing recomputed, in eager mode.

    For the tokenizer it is its first stage, with the adversary if there is one in any.
    """
    if job == "train_lightningdit":
        task, precision = lightningdit_step(config, images), config.train_lightningdit.precision
    else:
        stage, precision = config.tokenizer_phases()[0], config.train_vavae.precision
        task = tokenizer_step(config, stage, images, adversary=config.adversarial, measures=True)
    with task.ready() as work:
        ledger = _Ledger(task)
        # As the engines set it.
        half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        with half, saved_tensors_hooks(lambda tensor: _Held(tensor, ledger), lambda held: held.tensor):
            work()
    return ledger.peak


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
