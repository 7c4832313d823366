"""Evaluation of the LightningDiT's checkpoints, by the metrics of its export."""

import torch

from vavae.evaluation.evaluator import REFERENCES, Evaluator
from vavae.evaluation.metric import metrics_json
from vavae.evaluation.metrics import generation_metrics
from vavae.interop.averages import load_lightningdit_of_checkpoint
from vavae.interop.export import load_exported_tokenizer
from vavae.latents.manifest import read_latent_manifest
from vavae.latents.statistics import LatentNormalizer, read_statistics
from vavae.runs.checkpoints import CHECKPOINTS, average_set
from vavae.runs.config import RunConfig
from vavae.runs.evaluation_inputs import CheckpointEvaluationInputs
from vavae.runs.training_config import LightningDiTTrainingConfig
from vavae.sampling.labels import label_law
from vavae.sampling.sampler import Sampler, load_weak_model
from vavae.storage.storage import Storage
from vavae.tracking.trackers import track
from vavae.training.checkpoints.metrics import CheckpointMetrics
from vavae.training.checkpoints.retention import Retention


def evaluate_checkpoint(inputs: CheckpointEvaluationInputs, images_seen: int) -> None:
    """Generate with the average of a checkpoint, compare with the references of the run, and store the metrics.

    Args:
        inputs: those of a run whose configuration has its checkpoints evaluated.
        images_seen: images seen at the checkpoint.

    Raises:
        UserError: the references can't be had.
    """
    config, evaluator = inputs.evaluation.config, Evaluator(inputs.evaluation)
    settings = config.train_lightningdit.measure
    checkpoints = CheckpointMetrics.of(inputs.training, config.train_lightningdit)
    assert settings is not None, "train_lightningdit.measure is set"
    config = config.model_copy(update={"sample": config.sample.model_copy(update={"weights": settings.weights})})
    assert checkpoints is not None, "train_lightningdit.measure is set"
    for part in evaluator.missing(REFERENCES):
        evaluator.evaluate(part, lambda _: None)
    classes = read_latent_manifest(inputs.latents).classes
    label = label_law(config.sample, classes, config.seed)
    images = _load_sampler(inputs, config, images_seen, len(classes), evaluator.device).batches(
        range(settings.images),
        [label(index) for index in range(settings.images)],
        config.seed,
        config.guidance,
        config.solver,
        config.sample.batch_size,
    )
    generated = evaluator.summarize(images, settings.images)
    metrics = generation_metrics(generated, evaluator.references(), len(classes), config, evaluator.device)
    content = metrics_json(metrics)
    track(config.tracking, inputs.tracked, images_seen, {metric.name: metric.value for metric in metrics})
    checkpoints.write(images_seen, content)


def evaluate_pending_checkpoints(inputs: CheckpointEvaluationInputs) -> None:
    """Evaluate the pending checkpoints of a training that has ended, one after another, and delete superfluous ones."""
    training = inputs.evaluation.config.train_lightningdit
    checkpoints = CheckpointMetrics.of(inputs.training, training)
    for images_seen in checkpoints.waiting() if checkpoints is not None else ():
        evaluate_checkpoint(inputs, images_seen)
    prune_evaluated_checkpoints(inputs.training, training)


def prune_evaluated_checkpoints(training: Storage, config: LightningDiTTrainingConfig) -> None:
    """Delete the checkpoints of a training that has ended which stayed only until their evaluation.

    Args:
        training: folder of the training.
        config: its section of the configuration.
    """
    checkpoints = training.child(CHECKPOINTS)
    names = checkpoints.list()
    if names:
        Retention.of(training, config).prune(checkpoints, names[-1])


def _load_sampler(
    inputs: CheckpointEvaluationInputs, config: RunConfig, images_seen: int, classes: int, device: torch.device
) -> Sampler:
    """Load the run's tokenizer, and its LightningDiT with the average of a checkpoint that `sample.weights` names."""
    model = load_lightningdit_of_checkpoint(
        inputs.training,
        images_seen,
        config.lightningdit.with_classes(classes),
        config.tokenizer.latent_dim,
        config.grid,
        average_set(config.sample.weights),
    )
    tokenizer, _ = load_exported_tokenizer(inputs.evaluation.tokenizer.folder, encodes=False)
    normalizer = LatentNormalizer(*read_statistics(inputs.latents))
    weak = load_weak_model(inputs.weak, model)
    return Sampler.of(tokenizer, model, normalizer, config, device, weak)
