"""Jobs of a run in this process, as their modules in `ray_jobs` have actors do them."""

from vavae.config import digest
from vavae.distributed.world import World
from vavae.evaluation.evaluate import evaluate
from vavae.evaluation.evaluator import Evaluator
from vavae.interop.export import load_exported_tokenizer
from vavae.latents.encoding import place_tokenizer
from vavae.latents.extract import Extraction
from vavae.report.write_report import write_evaluation
from vavae.runs.evaluation_inputs import EvaluationInputs, ReportInputs
from vavae.runs.extraction_inputs import ExtractionInputs
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.files import write_sample_files
from vavae.sampling.sample_shards import SampleSet
from vavae.sampling.sampler import Sampler


def ignore(*_: object) -> None:
    """Take no notice of progress."""


def precompute_latents(run: Run) -> None:
    """Extract the latents."""
    inputs = ExtractionInputs.of(run)
    extraction = Extraction.of(inputs)
    tokenizer, _ = load_exported_tokenizer(inputs.tokenizer.folder)
    place_tokenizer(tokenizer, run.config, World().device)
    records = [extraction.encode(task, tokenizer, World().device, ignore) for task in extraction.tasks()]
    inputs.output.commit(*extraction.finish(inputs.config.latent_shape, records))


def sample(run: Run) -> None:
    """Generate the samples."""
    inputs = SamplingInputs.of(run)
    samples, sampler = SampleSet.of(inputs), Sampler.load(inputs, World().device)
    files = samples.files([samples.generate(shard, sampler, ignore) for shard in samples.shards()])
    inputs.output.commit(digest(list(files)), files, beside={**write_sample_files(samples, run.storage)})


def evaluate_and_report(run: Run) -> None:
    """Evaluate everything and write the report."""
    evaluator, output = Evaluator(EvaluationInputs.of(run)), run.output("evaluate")
    output.discard()
    write_evaluation(evaluate(evaluator, ignore), ReportInputs.of(run), output)
    evaluator.clean()
