"""What the LightningDiT of a checkpoint generates is measured as that of the export will be."""

import math

import torch

from vavae.evaluation.evaluator import REFERENCES, Evaluator
from vavae.evaluation.metric import metrics_json
from vavae.evaluation.metrics import generation_metrics
from vavae.interop.export import load_tokenizer
from vavae.latents.manifest import read_latent_manifest
from vavae.latents.statistics import read_statistics
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.normalizer import LatentNormalizer
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.sampling.labels import label_law
from vavae.sampling.sampler import Sampler
from vavae.storage.storage import Storage
from vavae.training.checkpoints.checkpoint import load_average
from vavae.training.checkpoints.metrics import CHECKPOINTS, CheckpointMetrics
from vavae.training.checkpoints.retention import Retention
from vavae.training.logging.log import show_checkpoint_metrics


def evaluate_checkpoint(run: Run, images_seen: int) -> None:
    """Generate with the average of a checkpoint, compare with the references of the run, and keep and show the figures.

    Args:
        run: whose `train_lightningdit.measure` says on how many images.
        images_seen: at the checkpoint.

    Raises:
        UserError: the references can't be had.
    """
    config, measuring = _as_custom(run), Evaluator(run)
    measures = CheckpointMetrics.of(_training(run), run.config.train_lightningdit)
    measure = run.config.train_lightningdit.measure
    assert measure is not None, "a run whose checkpoints are measured"
    assert measures is not None, "the same"
    for part in measuring.missing(REFERENCES):
        measuring.measure(part, lambda _: None)
    classes = read_latent_manifest(run.storage.child(run.prefix("precompute_latents"))).classes
    label = label_law(config.sample, classes, config.seed)
    images = _generator(run, images_seen, len(classes), measuring.device).batches(
        range(measure.images),
        [label(index) for index in range(measure.images)],
        config.seed,
        config.guidance,
        config.solver,
        config.sample.batch_size,
    )
    metrics = generation_metrics(
        measuring.summaries(images, measure.images), measuring.references(), config, measuring.device
    )
    metrics = [metric for metric in metrics if math.isfinite(metric.value)]
    # A folder of its own: TensorBoard follows the newest file of a folder, and the training goes on with its own.
    tensorboard = run.storage.child("tensorboard/train_lightningdit_measured")
    show_checkpoint_metrics(tensorboard, images_seen, {metric.name: metric.value for metric in metrics})
    measures.write(images_seen, metrics_json(metrics))


def evaluate_pending_checkpoints(run: Run) -> None:
    """Measure one after another the checkpoints that wait for it, and delete those that stayed for nothing else."""
    measures = CheckpointMetrics.of(_training(run), run.config.train_lightningdit)
    for images_seen in measures.waiting() if measures is not None else ():
        evaluate_checkpoint(run, images_seen)
    prune_evaluated_checkpoints(run)


def prune_evaluated_checkpoints(run: Run) -> None:
    """Delete the checkpoints of a training that has ended which stayed only because they waited to be measured."""
    training = _training(run)
    checkpoints = training.child(CHECKPOINTS)
    names = checkpoints.list()
    if names:
        Retention.of(training, run.config.train_lightningdit).prune(checkpoints, names[-1])


def _training(run: Run) -> Storage:
    return run.training_folder("train_lightningdit")


def _as_custom(run: Run) -> RunConfig:
    """The configuration, without the promise that figures follow an accepted protocol."""
    evaluate = run.config.evaluate.model_copy(update={"generation_protocol": "custom"})
    return run.config.model_copy(update={"evaluate": evaluate})


def _generator(run: Run, images_seen: int, classes: int, device: torch.device) -> Sampler:
    """The run's tokenizer with the average that lies in a checkpoint."""
    config, latents = run.config, run.storage.child(run.prefix("precompute_latents"))
    with torch.device("meta"):
        model = LightningDiT(config.lightningdit.with_classes(classes), config.tokenizer.latent_dim, config.grid)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    load_average(_training(run), images_seen, {f"model.{name}": each for name, each in model.state_dict().items()})
    tokenizer, _ = load_tokenizer(run.storage.child(run.prefix("train_vavae")))
    normalizer = LatentNormalizer(*read_statistics(latents))
    return Sampler(tokenizer.to(device), model.to(device), normalizer.to(device))
