"""References that are files: moments as they are, images whose moments are computed, and neither."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import image_shards, in_process
from support.trained_run import trained_run

from vavae.data.shards.manifest import write_manifest
from vavae.errors import UserError
from vavae.evaluation.evaluator import REFERENCES, Evaluator
from vavae.evaluation.generation import Reference
from vavae.metrics.features import summarize
from vavae.runs.evaluation_inputs import EvaluationInputs
from vavae.storage.storage import Storage

EXTRACTOR, FEATURES = "efficientnet_lite0", 1280
PIXELS = np.random.default_rng(0).integers(0, 256, (7, image_shards.SIZE, image_shards.SIZE, 3), np.uint8)


def evaluator(folder: Path, held_out: int = 4, **arrays: np.ndarray) -> Evaluator:
    """Evaluator of a run whose reference is a file of these arrays."""
    np.savez(folder / "some.npz", **arrays)
    run, shards = trained_run(folder), Storage(str(folder / "images"))
    write_manifest(shards, "", image_shards.write_image_shards(shards, {"train": (3,), "validation": (held_out,)}))
    evaluate = run.config.evaluate.model_copy(update={"reference": str(folder / "some.npz")})
    config = run.config.model_copy(update={"evaluate": evaluate})
    found = Evaluator(EvaluationInputs(config, run.storage, shards, run.stored("train_vavae"), None, None))
    for part in found.missing(REFERENCES):
        found.evaluate(part, in_process.ignore)
    return found


def test_images_without_moments_have_them_computed(tmp_path):
    found = evaluator(tmp_path, arr_0=PIXELS)
    (reference,) = found.references().values()
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()
    expected = Reference.of(summarize([images], found.extractors, 7)[EXTRACTOR], "")
    assert torch.equal(reference.pooled.mean, expected.pooled.mean)
    assert torch.equal(reference.pooled.covariance, expected.pooled.covariance)
    assert torch.equal(reference.kept, expected.kept)
    assert reference.images == 7
    assert reference.name == "7 images of some.npz, their moments computed here"


def test_moments_in_the_file_are_those_of_the_reference(tmp_path):
    found = evaluator(tmp_path, arr_0=PIXELS, mu=np.ones(FEATURES), sigma=np.eye(FEATURES))
    (reference,) = found.references().values()
    assert torch.equal(reference.pooled.mean, torch.ones(FEATURES).double())
    assert len(reference.kept) == 7
    assert reference.name == "some.npz"


def test_one_nan_is_no_reference(tmp_path):
    mean = np.zeros(FEATURES, np.float32)
    mean[7] = np.nan
    with pytest.raises(UserError, match=r"some.npz: mu\[7\] is nan: these are no moments; make the file again$"):
        evaluator(tmp_path, mu=mean, sigma=np.eye(FEATURES, dtype=np.float16))


def test_a_single_held_out_image_is_too_few(tmp_path):
    found = evaluator(tmp_path, held_out=1, mu=np.ones(FEATURES), sigma=np.eye(FEATURES))
    with pytest.raises(UserError, match="1 readable held-out images to measure against, and a Fréchet distance takes"):
        found.references()


def test_a_reconstruction_that_is_not_finite_is_named(tmp_path, monkeypatch):
    found = evaluator(tmp_path, mu=np.ones(FEATURES), sigma=np.eye(FEATURES))
    decode = found._reconstructor.tokenizer.decode
    monkeypatch.setattr(found._reconstructor.tokenizer, "decode", lambda z: decode(z) * torch.nan)
    (part,) = found.missing(["reconstructions"])
    with pytest.raises(
        UserError, match=r"^reconstruction of held-out image 0 \(the first of 4 such\): it is not finit"
    ):
        found.evaluate(part, in_process.ignore)
    assert found.missing(["reconstructions"]) == [part]
