"""Hardware of this machine."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Name of the processor, as its maker calls it where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
