"""Everything that can be checked before a worker starts."""

import importlib.util
from collections.abc import Sequence

from vavae.backbones.config import BackboneConfig
from vavae.backbones.weights import check_weights
from vavae.errors import UserError
from vavae.training.run import Job, Run


def preflight(run: Run, jobs: Sequence[Job]) -> None:
    """Check pretrained weights, what the jobs need of each other, and storage access.

    Raises:
        UserError: storage can't be written, or weights can't be had.
    """
    config = run.config
    backbones: list[BackboneConfig] = []
    if "train_vavae" in jobs:
        backbones.append(config.teacher.backbone)
        if config.losses.perceptual.kind == "lpips" and config.losses.perceptual.weight > 0:
            backbones.append(config.losses.perceptual.backbone)
    if "evaluate" in jobs:
        if config.shards.validation_source is None and not config.shards.validation_fraction:
            raise UserError("shards.validation_fraction=0 leaves evaluate no held-out images: raise it")
        if config.evaluate.class_agreement and importlib.util.find_spec("sklearn") is None:
            raise UserError("evaluate.class_agreement=true needs scikit-learn: pip install 'vavae[quickstart]'")
        backbones.append(BackboneConfig(name=config.evaluate.metrics.extractor))
    for backbone in backbones:
        check_weights(backbone)
    try:
        run.storage.write_bytes(".access", b"")
        run.storage.delete(".access")
    except OSError as error:
        raise UserError(f"storage.root={config.storage.root}: cannot write there ({error})") from error
