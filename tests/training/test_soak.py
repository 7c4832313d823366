"""The short form of `tests/soak.py`."""

from pathlib import Path

import pytest
from soak import soak
from support.gloo import GlooLauncher


@pytest.mark.gloo
def test_a_training_survives_everything(gloo: GlooLauncher, tmp_path: Path) -> None:
    report = soak(gloo, tmp_path, seed=0, seconds=45)
    assert report.rounds >= 2
    assert not report.missed
