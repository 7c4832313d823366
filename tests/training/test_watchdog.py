"""A process that hangs ends itself and says where it was."""

import subprocess
import sys

HANG = """
import time
from vavae.training.watchdog import Watchdog

def wait_for_the_other_ranks():
    time.sleep(60)

with Watchdog(0.3) as watchdog:
    for _ in range({steps}):
        watchdog.feed()
        time.sleep(0.1)
    {end}
"""


def run(steps: int, end: str) -> subprocess.CompletedProcess[str]:
    code = HANG.format(steps=steps, end=end)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)


def test_a_hanging_process_ends_and_prints_its_stack() -> None:
    ended = run(1, "wait_for_the_other_ranks()")
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "in wait_for_the_other_ranks" in ended.stderr


def test_progress_keeps_it_alive_and_the_end_lets_it_go() -> None:
    ended = run(8, "pass\ntime.sleep(0.5)")
    assert (ended.returncode, ended.stderr) == (0, "")
