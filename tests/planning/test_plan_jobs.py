"""Plans of whole runs against figures computed by hand, and the command that prints them."""

from functools import partial

import pytest
import torch
from support.image_shards import CLASSES
from support.recipes import recipe_config
from support.training_steps import BATCH, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vavae.cli.main import main
from vavae.config.load import load
from vavae.distributed.world import World
from vavae.models.backbones.load import meta_backbone
from vavae.models.dit.config import RoutingConfig
from vavae.models.dit.model import LightningDiT
from vavae.planning import jobs
from vavae.planning import training as training_estimate
from vavae.planning.activations import activation_bytes, saved_bytes
from vavae.planning.cluster import ClusterSpec
from vavae.planning.jobs import Dataset, estimate_jobs, tokenizer_flops, velocity_evaluations
from vavae.planning.sizes import checkpoint_bytes, muon_matrices, trained_parameters, training_bytes
from vavae.planning.training import estimate_training, lanes_that_fit, resolve_lanes_at_once
from vavae.runs.config import RunConfig
from vavae.training.flops.flops import over_depth
from vavae.training.flops.meta_models import frozen_networks, lightningdit_step, tokenizer_step

XL = "configs/imagenet/lightningdit_xl_64_epochs.yaml"
TINY = "configs/tiny.yaml"
LIGHT = "losses.perceptual.kind=none"
"""Leaves out what takes long to count."""


@pytest.fixture(scope="module")
def xl():
    """Eight H100 at half of their best rate, with a store that is never in the way."""
    config = load(RunConfig, XL, ["workers.count=8", "workers.tf32=true", "train_vavae.stages=[]"])
    found = estimate_jobs(config, ClusterSpec("H100", 8, utilization=0.5, store=1e12), Dataset(1_281_167, 100_000))
    return {job.job: job for job in found}


def test_lightningdit_xl_on_eight_h100(xl):
    """695 images/s of each; a step of 1024 sends 3 · 7/8 · 4 B · 674 M at 450 GB/s and waits for a third, the weights.

    The gradients' two thirds are hidden by the last of four backward passes.
    """
    job = xl["train_lightningdit"]
    assert (job.images, job.steps) == (81_920_000, 80_000)
    assert job.rates["compute"] == pytest.approx(8 * 695, rel=2e-3)
    assert job.bytes_sent == pytest.approx(3 * 7 / 8 * 4 * 674e6, rel=1e-3)
    assert job.rates["network"] == pytest.approx(1024 / (3 * 7 / 8 * 4 * 674e6 / 450e9), rel=1e-3)
    step = 1024 / (8 * 695) + 7 / 8 * 4 * 674e6 / 450e9
    assert job.images_per_second == pytest.approx(1024 / step, rel=2e-3)
    assert job.hours * (1 - job.training.lost) == pytest.approx(80_000 * step / 3600, rel=2e-3)
    assert job.bottleneck == "compute"
    assert job.bytes_read == 2 * 2 * 32 * 16 * 16 * 2 + 2560


def test_checkpoints_of_lightningdit_xl(xl):
    """10.8 GB with the average, copied at 25 GB/s by each of eight GPUs."""
    training = xl["train_lightningdit"].training
    assert training.checkpoint == pytest.approx(10.8e9, rel=2e-3)
    assert training.stall_seconds == pytest.approx(0.054, rel=2e-3)
    assert training.upload_seconds == pytest.approx(0.0108, rel=2e-3)
    assert training.advised_seconds == pytest.approx((2 * 0.054 * 86_400) ** 0.5, rel=2e-3)
    assert training.configured_seconds == pytest.approx(5_120_000 / xl["train_lightningdit"].images_per_second)
    saved = [training.memory[0] - memory for memory in training.memory]
    buckets = 4 * 50e6
    assert saved[1] == pytest.approx(4 * 674e6 * (2 - 3 / 8) - 3 * buckets, rel=2e-3)
    assert saved[2] == pytest.approx(4 * 674e6 * (3 - 4 / 8) - 3 * buckets, rel=2e-3)
    # All weights are gathered: DeepSpeed's own limits are above their number.
    assert saved[3] == pytest.approx(4 * 674e6 * (3 - 5 / 8) - 2 * buckets, rel=2e-3)


def test_limits_make_room_in_zero_stage_3():
    limits = {"max_live_parameters": 0, "max_reuse_distance": 0, "bucket_elements": 1000}
    overrides = [LIGHT, *(f"train_lightningdit.engine.{name}={limit}" for name, limit in limits.items())]
    free, limited = (
        estimate_training(load(RunConfig, TINY, lines), ClusterSpec("L4", 4), "train_lightningdit", 1.0)
        for lines in ([LIGHT, "train_lightningdit.engine.bucket_elements=1000"], overrides)
    )
    assert free.memory[:3] == limited.memory[:3]
    assert free.memory[3] - limited.memory[3] == 4 * free.parameters


def test_tokenizer_and_latents_on_eight_h100(xl):
    """TF32. 1,790 encoded images/s of each, half of that with the mirror image."""
    assert xl["precompute_latents"].rates["compute"] == pytest.approx(8 * 1790 / 2, rel=0.02)
    assert xl["precompute_latents"].bytes_written == 1_281_167 * (2 * 2 * 32 * 16 * 16 * 2 + 2560)
    assert xl["prepare_shards"].bytes_written == 1_281_167 * 100_000
    tokenizer = xl["train_vavae"]
    assert tokenizer.steps == 650_650
    assert tokenizer.rates["compute"] == pytest.approx(8 * 0.5 * 494.7e12 / tokenizer.flops)
    assert tokenizer.flops / 2e9 == pytest.approx(878.6, rel=1e-3)
    frozen = 4 * (304.4e6 + 14.7e6)  # DINOv2-L and the convolutions of VGG16
    without = tokenizer.training.memory[0] - tokenizer.training.activations - 16 * tokenizer.training.parameters
    assert without == pytest.approx(frozen, rel=2e-3)


def test_samples_on_eight_h100(xl):
    """Euler, 249 steps, of which 181 lie in the interval and take two velocity_evaluations, in TF32."""
    job = xl["sample"]
    assert job.rates["compute"] == pytest.approx(8 * 0.5 / ((249 + 181) * 237.25e9 / 494.7e12), rel=5e-3)
    assert job.bytes_written == 50_000 * 3 * 256**2


@pytest.fixture
def remembered(monkeypatch):
    """Counting takes seconds, and what is counted does not depend on the machines."""
    names = {jobs: ("training_flops", "encoding_flops", "decoding_flops", "velocity_flops")}
    for module, counts in {**names, training_estimate: ("activation_bytes",)}.items():
        for name in counts:
            monkeypatch.setattr(module, name, partial(_remember, getattr(module, name)))


_KNOWN = {}


def _remember(count, config, *arguments):
    key = (count.__name__, config.name, *arguments)
    if key not in _KNOWN:
        _KNOWN[key] = count(config, *arguments)
    return _KNOWN[key]


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["solver={name: euler, num_steps: 10}"], 10),
        (["solver={name: heun, num_steps: 10}"], 20),
        (["solver={name: heun, num_steps: 10}", "lightningdit.prediction=data"], 19),
        (["solver={name: euler, num_steps: 10}", "guidance.scale=2"], 20),
        (["solver={name: euler, num_steps: 10}", "guidance={scale: 2, interval: [0.45, 0.75]}"], 13),
    ],
)
def test_evaluations_of_a_sample(overrides, count):
    assert velocity_evaluations(load(RunConfig, TINY, overrides)) == (count, 0, 0)


def test_guidance_by_routing_adds_evaluations_on_fewer_tokens():
    solver, guidance = "solver={name: euler, num_steps: 10}", "guidance={routing_scale: 2, routing_interval: [0.45, 1]}"
    config = load(RunConfig, TINY, [solver, guidance, "lightningdit.routing={first_block: 0, last_block: 1}"])
    assert velocity_evaluations(config) == (10, 0, 5)
    flops = [jobs.velocity_flops(config, drop) for drop in (0, 0.5)]
    assert flops[1] < flops[0]
    sampling = jobs._sample(config, ClusterSpec("L4", 1))
    assert sampling.flops == pytest.approx(10 * flops[0] + 5 * flops[1] + jobs.decoding_flops(config))


def test_guidance_by_path_drop_evaluates_the_null_label_without_the_path():
    solver, guidance = (
        "solver={name: euler, num_steps: 10}",
        "guidance={scale: 2, path_drop: true, interval: [0.45, 1]}",
    )
    routing = "lightningdit.routing={first_block: 0, last_block: 1, fuse: {}}"
    config = load(RunConfig, TINY, [solver, guidance, routing])
    assert velocity_evaluations(config) == (10, 5, 0)
    flops = [jobs.velocity_flops(config, drop) for drop in (0, 1)]
    assert jobs._sample(config, ClusterSpec("L4", 1)).flops == 10 * flops[0] + 5 * flops[1] + jobs.decoding_flops(
        config
    )


def test_evaluations_of_adaptive_steps_grow_with_what_is_asked_of_them():
    loose, tight = (
        velocity_evaluations(load(RunConfig, TINY, [f"solver={{name: dopri5, rtol: {r}}}"])).whole for r in (1e-2, 1e-5)
    )
    assert 6 < loose < tight


@pytest.mark.parametrize(
    ("image_bytes", "cluster", "bottleneck"),
    [
        (1e12, {"store": 1e15}, "store"),
        (None, {"network": 1.0, "node_gpus": 1, "store": 1e15}, "network"),
        (1.0, {"store": 1e6}, "checkpoints"),
    ],
)
def test_whatever_is_slowest_is_the_bottleneck(remembered, image_bytes, cluster, bottleneck):
    config = load(RunConfig, TINY, [LIGHT])
    job = estimate_jobs(config, ClusterSpec("L4", 4, **cluster), Dataset(1000, image_bytes))[1]
    assert (job.job, job.bottleneck) == ("train_vavae", bottleneck)
    assert job.images_per_second <= min(job.rates.values())


@pytest.mark.parametrize(("section", "job"), [("latents", "precompute_latents"), ("sample", "sample")])
def test_inference_is_planned_in_its_precision(remembered, section, job):
    """The bf16 rate of an L4 is four times its fp32 rate."""
    full, half = (
        {
            each.job: each
            for each in estimate_jobs(
                load(RunConfig, TINY, [LIGHT, f"{section}.precision={precision}"]), ClusterSpec("L4", 1), Dataset(1000)
            )
        }
        for precision in ("fp32", "bf16")
    )
    changed = {name for name in full if full[name].arithmetic != half[name].arithmetic}
    assert changed == {job}
    assert half[job].arithmetic == "bf16"
    assert half[job].rates["compute"] == pytest.approx(2 * full[job].rates["compute"], rel=0.01)


def test_an_uneven_share_of_lanes_costs_an_accumulation_step(remembered):
    """Four lanes on three workers take two accumulation steps, as on two."""
    config = load(RunConfig, TINY, [LIGHT])
    two, three = (estimate_jobs(config, ClusterSpec("L4", count), Dataset(1000))[3] for count in (2, 3))
    assert two.job == "train_lightningdit"
    assert two.rates["compute"] == three.rates["compute"]


def test_the_tokenizer_is_planned_over_its_phases(remembered):
    """Half of its images without an adversary, then half with."""
    config = load(RunConfig, TINY, [LIGHT])
    before, after = (jobs.training_flops(config, "train_vavae", seen) for seen in (0, 64))
    assert before < after
    assert tokenizer_flops(config) == pytest.approx((before + after) / 2)


def test_activations_are_what_a_real_forward_pass_leaves_behind():
    config = tiny_config()
    images = BATCH // config.stream.lanes
    model = LightningDiT(config.lightningdit.with_classes(len(CLASSES)), 4, 8)
    known, kept = {parameter.data_ptr() for parameter in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.zeros(images, 4, 8, 8), torch.rand(images), torch.zeros(images, dtype=torch.int64))
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)
    planned = activation_bytes(config, "train_lightningdit", images)
    losses = 8 * out.numel() * 4  # of the objective, which stands on the velocity
    assert found <= planned <= found + losses


@pytest.mark.parametrize(
    "routing", [None, RoutingConfig(first_block=1, last_block=3), RoutingConfig(last_block=3, drop=0.75, fuse={})]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_blocks_take_is_counted_once_and_multiplied(recompute, routing):
    """Five blocks, by those of one and two, and of three where tokens skip some, and all together."""
    config = tiny_config()
    update = {"depth": 5, "checkpoint_activations": recompute, "routing": routing}
    section = config.lightningdit.model_copy(update=update)
    deep = config.model_copy(update={"lightningdit": section})

    def count(config):
        with lightningdit_step(config, 2).ready() as step:
            return step()

    for of_blocks in (count, lambda config: saved_bytes(lightningdit_step(config, 2), "fp32")):
        assert over_depth(deep, of_blocks) == of_blocks(deep)


def test_tokens_that_skip_blocks_save_memory_unless_all_return_before_the_end():
    plain = tiny_config()
    config = recipe_config("routing")

    def until(images):
        routing = config.lightningdit.routing.model_copy(update={"until_images": images})
        section = config.lightningdit.model_copy(update={"routing": routing})
        return activation_bytes(config.model_copy(update={"lightningdit": section}), "train_lightningdit", 2)

    whole, budget = activation_bytes(plain, "train_lightningdit", 2), config.train_lightningdit.images
    assert until(None) == until(budget) < whole == until(budget - 1)


@pytest.mark.parametrize("adversary", [False, True])
def test_remembered_operators_count_as_the_counter_of_torch(adversary):
    config = load(RunConfig, TINY)
    phase = config.tokenizer_phases()[0]

    def step():
        return tokenizer_step(config, phase, 2, adversary=adversary, measure_weights=True)

    frozen_networks.cache_clear()
    model = step()
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        for module in model.modules:
            module.to_empty(device="cpu")
        with sdpa_kernel(SDPBackend.MATH):
            model.work()
    frozen_networks.cache_clear()
    for _ in range(2):  # asked for the first time, and remembered
        with step().ready() as work, sdpa_kernel(SDPBackend.MATH):
            assert work() == counter.get_total_flops()


def test_activations_grow_with_the_micro_batch_and_shrink_in_bf16():
    full, half = tiny_config(), tiny_config(precision="bf16")
    one, two, four = (activation_bytes(full, "train_lightningdit", images) for images in (1, 2, 4))
    assert four - two == 2 * (two - one)
    in_half = [activation_bytes(half, "train_lightningdit", images) for images in (2, 4)]
    assert 0.4 < (in_half[1] - in_half[0]) / (four - two) < 0.9


def test_checkpoints_hold_all_engines():
    config = load(RunConfig, TINY, [LIGHT])
    generator, discriminator = trained_parameters(config, "train_vavae").values()
    assert checkpoint_bytes(config, "train_vavae") == 4 * 3 * (generator + discriminator)
    averaged = load(RunConfig, TINY, ["train_vavae.ema_decay=0.9"])
    assert checkpoint_bytes(averaged, "train_vavae") == 4 * (4 * generator + 3 * discriminator)
    alone = load(RunConfig, TINY, ["losses.adversarial.weight=0"])
    assert checkpoint_bytes(alone, "train_vavae") == 4 * 3 * generator


def test_a_discriminator_on_features_has_heads_in_checkpoints_and_a_frozen_network_in_memory():
    """Heads of 384 channels, each of a convolution of one position, one of nine and one to a logit."""
    on_patches, on_features = (
        tiny_config(losses={"adversarial": {"kind": kind, "start_images": 0}}) for kind in ("patch", "features")
    )
    generator, heads = trained_parameters(on_features, "train_vavae").values()
    assert heads == 5 * (384**2 + 9 * 384**2 + 384 + 2 * 3 * 384 + 1)
    assert checkpoint_bytes(on_features, "train_vavae") == 4 * (4 * generator + 3 * heads)
    network = meta_backbone(on_features.losses.adversarial.features.backbone)
    frozen = [training_estimate.frozen_bytes(each, "train_vavae") for each in (on_patches, on_features)]
    assert frozen[1] - frozen[0] == 4 * sum(parameter.numel() for parameter in network.parameters())


def test_further_averages_take_memory_checkpoints_and_snapshots():
    profiles = "train_lightningdit.averages=[{name: a, std: 0.05}, {name: b, std: 0.1}, {name: c, decay: 0.9}]"
    plain, more, kept = (
        load(RunConfig, TINY, [LIGHT, *fields])
        for fields in ([], [profiles], [profiles, "train_lightningdit.average_snapshot_images=100"])
    )
    job = "train_lightningdit"
    (weights,) = trained_parameters(plain, job).values()
    assert checkpoint_bytes(more, job) - checkpoint_bytes(plain, job) == 4 * 3 * weights
    growth = training_bytes(more, job) - training_bytes(plain, job)
    assert growth == 4 * weights * (3 * plain.train_lightningdit.keep_checkpoints + 3)
    assert training_bytes(kept, job) - training_bytes(more, job) == 4 * weights * 2 * (256 // 100)
    held, held_plain = (estimate_training(each, ClusterSpec("H100", 2), job, 1.0).memory for each in (more, plain))
    assert [one - other for one, other in zip(held, held_plain, strict=True)] == [4 * 3 * weights / 2] * 4


def test_muon_of_lightningdit_xl(xl, monkeypatch):
    """17.6 TFLOP a step where fused matrices stay whole, an eighth on each of eight GPUs; one moment less."""
    engine = ["workers.count=8", "workers.tf32=true", "train_lightningdit.engine.backend=torch"]
    plain, whole, split = (
        load(RunConfig, XL, [*engine, f"train_lightningdit.optimizer.muon={muon}"])
        for muon in ("null", "{split_fused: false}", "{}")
    )
    found = muon_matrices(whole, "train_lightningdit")["lightningdit"]
    assert found.flops(workers=1) == pytest.approx(17.6e12, rel=5e-3)
    assert found.flops(workers=8) == pytest.approx(17.6e12 / 8, rel=0.02)
    width, hidden, depth = 1152, 3072, 28
    assert found.numel == depth * (3 + 1 + 6) * width**2 + depth * 3 * width * hidden
    assert found.update_bytes == 2 * found.numel
    assert not muon_matrices(plain, "train_lightningdit")
    monkeypatch.setattr(training_estimate, "activation_bytes", lambda *_: 1e9)
    cluster, (job, flops) = (
        ClusterSpec("H100", 8, utilization=0.5),
        ("train_lightningdit", xl["train_lightningdit"].flops),
    )
    before, after = (jobs._train(config, cluster, job, flops, 1.0) for config in (plain, split))
    assert before.training.checkpoint - after.training.checkpoint == 4 * found.numel
    assert before.training.memory[0] - after.training.memory[0] == 4 * found.numel
    assert len(after.training.memory) == 1, "no other stage takes it"
    seconds = 1024 / after.rates["compute"] - 1024 / before.rates["compute"]
    busiest = muon_matrices(split, job)["lightningdit"].flops(workers=8)
    assert seconds == pytest.approx(busiest / (0.5 * 989.4e12), rel=1e-6)
    assert (before.muon_flops, after.muon_flops) == (0, pytest.approx(18.8e12, rel=5e-3))


def test_muon_of_a_tokenizer_is_planned_for_both_networks():
    config = load(RunConfig, TINY, [LIGHT, "train_vavae={engine: {zero_stage: 0}, optimizer: {muon: {}}}"])
    found = muon_matrices(config, "train_vavae")
    generator, discriminator = trained_parameters(config, "train_vavae").values()
    assert {*found} == {"generator", "discriminator"}
    assert 0.9 * generator < found["generator"].numel < generator
    sizes = 4 * (3 * (generator + discriminator) - found["generator"].numel - found["discriminator"].numel)
    assert checkpoint_bytes(config, "train_vavae") == sizes


def test_a_pass_takes_as_many_lanes_as_fit():
    config = load(RunConfig, XL, ["workers.count=2", "train_lightningdit.lanes_at_once=auto"])
    lanes = {memory: lanes_that_fit(config, 2, memory * 1e9) for memory in (1, 40, 80, 141, 10_000)}
    assert lanes[1] == 1
    assert 1 <= lanes[40] < lanes[80] < lanes[141] <= lanes[10_000] == config.stream.lanes // 2
    assert resolve_lanes_at_once(config, World()).train_lightningdit.lanes_at_once == 1, "on a CPU bits are promised"
    grouped, single = (
        estimate_training(each, ClusterSpec("H100", 2), "train_lightningdit", 1.0)
        for each in (config, resolve_lanes_at_once(config, World()))
    )
    assert grouped.activations == pytest.approx(lanes[80] * single.activations)


def test_the_command_prints_a_plan(remembered, capsys):
    options = ["--gpus", "8xL4", "--price", "0.5", "--images", "1535", "workers.tf32=false"]
    assert main(["plan", "--config", TINY, *options, LIGHT]) == 0
    printed = capsys.readouterr().out
    assert "8 x L4 in 1 machines" in printed
    for row in ("GFLOP per image", "bound by", "cost", "best every", "memory in ZeRO stage 3"):
        assert row in printed
    assert "GFLOP of Muon per step" not in printed
    assert "run it with stream.lanes=8 workers.count=8 workers.use_gpu=true latents.actors=8 sample.actors=8" in printed
    assert "workers.tf32=true would compute what is in fp32 up to 2.0 times as fast" in printed
    assert "assumed: 1,535 images; 30% of the GPU's best rate" in printed
    assert "initial weights" not in printed
    assert main(["plan", "--config", TINY, *options, LIGHT, "train_lightningdit.ema_ramp=null"]) == 0
    assert "ema_decay=0.9: after 8 steps the average of the weights would still be 43%" in capsys.readouterr().out
    muon = "train_lightningdit={optimizer: {muon: {}}, engine: {zero_stage: 0}}"
    assert main(["plan", "--config", TINY, *options, LIGHT, muon]) == 0
    assert "GFLOP of Muon per step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8xV100"], "error: GPU 'V100' is not known; did you mean H100? there are B200,"),
        (["--gpus", "8xH100", "--utilization", "40"], "error: --utilization 40: give a share, at most 1"),
        (["--gpus", "8xH100", "--price", "0"], "error: --price 0: give a number above 0"),
        (["--gpus", "7xH100"], "train_vavae.batch_size=16 is no multiple of stream.lanes=7"),
    ],
)
def test_mistakes_take_one_line(capsys, arguments, message):
    assert main(["plan", "--config", TINY, *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
