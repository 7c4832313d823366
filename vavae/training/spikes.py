"""Detection of losses far above recent ones."""

import math


class SpikeDetector:
    """Comparison of every loss with a running mean and standard deviation of those before.

    Args:
        deviations: standard deviations above the mean from which on a loss is a spike; None finds none.
        horizon: steps over which mean and variance are averaged; as many pass before the first spike is found.
    """

    def __init__(self, deviations: float | None, horizon: int = 100) -> None:
        self._deviations, self._horizon = deviations, horizon
        self._steps, self._mean, self._variance = 0, 0.0, 0.0

    def limit(self) -> float:
        """Loss above which the next one is a spike; infinity before the horizon has passed."""
        if self._deviations is None or self._steps < self._horizon:
            return math.inf
        return self._mean + self._deviations * math.sqrt(self._variance)

    def is_spike(self, loss: float) -> bool:
        """Return whether a loss is a spike, and average it up to the limit, so that a lasting change ends being one."""
        if not math.isfinite(loss):
            return True
        limit = self.limit()
        self._steps += 1
        rate = max(1 / self._steps, 1 / self._horizon)
        change = min(loss, limit) - self._mean
        self._mean += rate * change
        self._variance = (1 - rate) * (self._variance + rate * change**2)
        return loss > limit
