"""Process-wide settings of torch: threads, TF32 and determinism."""

import os

import torch

from vavae.distributed.config import WorkersConfig


def configure_torch(workers: WorkersConfig) -> None:
    """Set torch's threads, TF32, choice of convolutions and determinism; before the first use of a GPU."""
    torch.set_num_threads(workers.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = workers.rounds_to_tf32
    torch.backends.cudnn.benchmark = not workers.deterministic  # tries all algorithms for each shape once
    if workers.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
