"""The names that lie on storage and the words that key randomness, which stay when the code is renamed around them."""

import ast
from pathlib import Path
from typing import get_args

from vavae.data.shards.manifest import Manifest, ShardInfo
from vavae.data.shards.write import KIND, ShardRecord
from vavae.interop.export import ALIGNMENT, DESCRIPTION, WEIGHTS
from vavae.latents.extract import LatentShardRecord
from vavae.latents.manifest import LatentManifest
from vavae.runs.checkpoints import CHECKPOINTS
from vavae.runs.events import EVENTS, Kind
from vavae.runs.files import CONFIG
from vavae.runs.jobs import JOBS
from vavae.runs.run import IMPORTED, PUBLISHED
from vavae.sampling.sample_shards import SampleShardRecord
from vavae.storage.artifact import RECORD, Artifact, FileInfo
from vavae.sweep.sweep import SHARED, TRIALS
from vavae.sweep.trial import IMAGES, Entry
from vavae.tracking.trackers import TRACKING
from vavae.training.callbacks.callback import PREVIEWS
from vavae.training.checkpoints.metrics import EVALUATIONS
from vavae.training.checkpoints.state import TrainState
from vavae.training.hardware import HARDWARE, Hardware
from vavae.training.logging.metric_names import JOB_METRICS, METRICS, metric_name

ROOT = Path(__file__).parents[1]
PURPOSES = """
agreement|augment|bench|block|class_token_noise|discriminator|discriminator_augment|equivariance|guidance_input|
interval_end|interval_length|kernel distance|label_dropout|latent tokens|latent_noise|lightningdit|mind|mirror|noise|
observed posterior|optuna|path_dropout|posterior|reconstruction|released latents|routing|sample|sample class token|
sample label|sample routing|shards|sweep|timesteps|tokenizer|variety|weights
"""
COLUMN_NAMES = """
loss/total loss/reconstruction loss/l1 loss/perceptual loss/kl loss/adversarial loss/discriminator loss/cosine
loss/distance loss/velocity loss/intermediate loss/instantaneous loss/representation loss/class_token loss/direction
loss_at_timestep/0.0 loss_at_timestep/0.1 loss_at_timestep/0.2
loss_at_timestep/0.3 loss_at_timestep/0.4 loss_at_timestep/0.5 loss_at_timestep/0.6 loss_at_timestep/0.7
loss_at_timestep/0.8 loss_at_timestep/0.9 alignment adaptive_weight/vf adaptive_weight/adversarial latent/spectrum_slope
latent/effective_rank latent/channel_std_min latent/channel_std_max latent/local_to_global latent/high_frequency_share
latent/velocity_variance equivariance_error/quarter_turn equivariance_error/half_size logits_real logits_fake
discriminator_accuracy output_variance gradient_norm/generator gradient_norm/discriminator gradient_norm/lightningdit
learning_rate skipped_steps loss_spikes unreadable_images images_per_second flops_per_second model_flop_utilisation
data_wait forward backward optimizer observe_wait checkpoint_wait checkpoint/stall_seconds checkpoint/bytes
gpu_memory/peak_bytes gpu_memory/reserved_bytes storage/bytes_read storage/bytes_written storage/requests
storage/retries
images images_planned stage_running restarts saved_timestamp_seconds
"""
EVENT_NAMES = """
started stage_begun restored checkpoint restart skipped_step loss_spike collapse rollback measured measure_skipped stop
failed stage_done done
"""
FILES = {
    RECORD: "artefact.json", CONFIG: "config.yaml", HARDWARE: "hardware.json", EVENTS: "events", PREVIEWS: "previews",
    CHECKPOINTS: "checkpoints", EVALUATIONS: "measures", SHARED: "shared", TRIALS: "trials",
    WEIGHTS: "model.safetensors", ALIGNMENT: "alignment.safetensors", DESCRIPTION: "model.yaml",
    PUBLISHED["train_vavae"]: "vae", PUBLISHED["train_lightningdit"]: "transformer",
    IMPORTED: "imported", IMAGES: "images_seen", KIND: "shards", TRACKING: "tracking",
}  # fmt: skip
KINDS = {
    "prepare_shards": "image shards",
    "train_vavae": "tokenizer",
    "precompute_latents": "latents",
    "train_lightningdit": "LightningDiT",
    "sample": "samples",
    "evaluate": "measures and report",
}
RECORDS = {
    Artifact: "kind digest config inputs images_seen files details",
    FileInfo: "bytes sha256",
    LatentShardRecord: "origin shard statistics keys captions sums skipped",
    TrainState: "images_seen config data excluded",
    LatentManifest: "tokenizer shape flip classes splits kind statistics online",
    ShardRecord: "plan shard skipped",
    ShardInfo: "name count bytes sha256 url dropped",
    Manifest: "splits classes image_size sources skipped skipped_count excluded image_key label_key by_name channels "
    "depth",
    SampleShardRecord: "origin images file",
    Hardware: "workers device threads torch lanes_at_once",
}
GENERATORS = {"torch_generator", "numpy_generator", "key_seed"}


def words(arguments):
    return [each.value for each in arguments if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def called(call):
    return ast.unparse(call.func).rpartition(".")[2]


def purposes():
    """The words in calls of the generators, and in calls of functions that hand a parameter on as such a word."""
    trees = [ast.parse(path.read_text()) for folder in ("vavae", "ray_jobs") for path in (ROOT / folder).rglob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    known, before = GENERATORS, set()
    while known != before:
        before = known
        known = known | {
            function.name
            for function in functions
            for call in ast.walk(function)
            if isinstance(call, ast.Call) and called(call) in known
            if {"purpose", "*key"} & {*map(ast.unparse, call.args)}
        }
    return {word for call in calls if called(call) in known for word in words(call.args)}


def test_the_words_that_key_randomness_stay():
    assert purposes() == {word for line in PURPOSES.split("\n") for word in line.split("|") if word}


def test_names_on_storage_stay():
    assert [*METRICS, *JOB_METRICS] == COLUMN_NAMES.split()
    assert [*get_args(Kind)] == EVENT_NAMES.split()
    assert {job: stage.makes for job, stage in JOBS.items()} == KINDS
    assert [(ours, stored) for ours, stored in FILES.items() if ours != stored] == []
    fields = {
        model: " ".join(field.serialization_alias or name for name, field in model.model_fields.items())
        for model in RECORDS
    }
    assert fields == RECORDS
    assert Entry._fields == ("point", "state", "why")
    assert metric_name("loss/total") == "vavae_loss_total"
