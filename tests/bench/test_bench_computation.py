"""The benchmarks of computation: their sides agree before they are measured, and every figure is of what it says."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from support.gloo import GlooLauncher
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vavae.bench import computation, extraction, gpu_table, lightningdit, sampling, tokenizer
from vavae.bench.benchmark import Measurement
from vavae.bench.computation import Computation, Side, dense_peak, measure, ratio_table, side_table
from vavae.bench.gpu_table import Part, parts, rows_of
from vavae.bench.profile import TurnProfile, profile_turn, read_trace
from vavae.bench.record import BenchmarkResults
from vavae.bench.run import measure_all
from vavae.bench.steps import assert_equal_steps
from vavae.cli import bench as command
from vavae.cli.main import main
from vavae.config.load import load
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.losses import objective
from vavae.runs.config import RunConfig
from vavae.training.flops.flops import training_flops

CPU = torch.device("cpu")
REPRESENTATION = [
    "tokenizer={kind: representation, latent_dim: 112, encoder: {}, decoder: {size: B, patch_size: 16}, "
    "channels: 128, channel_multipliers: [1, 1, 2, 2, 4], res_blocks: 2, attention_levels: [4], norm_groups: 32}",
    "losses.kl_weight=0", "losses.vision_foundation.weight=0",
]  # fmt: skip
TINY = [
    "tokenizer.channel_multipliers=[1,1,1]", "tokenizer.attention_levels=[]", "losses.perceptual.kind=none",
    "losses.adversarial.layers=1", "shards.image_size=16", "train_vavae.batch_size=1", "latents.batch_size=2",
    "lightningdit.depth=2", "lightningdit.width=32", "lightningdit.heads=2", "train_lightningdit.batch_size=4",
    "solver.num_steps=2", "sample.batch_size=2",
]  # fmt: skip
PEER = "support.public_lightningdit:PublicLightningDiT"
ROUTING = "lightningdit.routing={first_block: 0, last_block: 1}"


@pytest.fixture(autouse=True)
def settings():
    """A configuration sets up the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny(*overrides):
    return load(RunConfig, command._CONFIGS / "tokenizer.yaml", [*TINY, *overrides])


def cells(lines):
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]


def test_the_lightningdit_is_measured_beside_a_peer_and_its_products(capsys, tmp_path):
    results, trace = tmp_path / "results.json", tmp_path / "trace.json"
    options = ["--sides", "eager", "--rounds", "2", "--peer", PEER, "--device", "cpu"]
    assert main(["bench", "train-lightningdit", *options, f"--json={results}", f"--profile={trace}", *TINY]) == 0
    _, *sides, head, first, second = cells(capsys.readouterr().out.splitlines())
    assert [row[0] for row in sides] == ["eager", "peer", "its products alone"]
    assert head[:2] == ["time of", "in units of"]
    assert [row[:2] for row in (first, second)] == [["eager", "its products alone"], ["eager", "peer"]]
    found = BenchmarkResults.read(results, "train-lightningdit")
    units = {side.unit: len(side.values) for side in found.sides}
    reads = "aten::_local_scalar_dense in one turn"
    assert units == {"s of processor": 2, "s on the wall": 2, "img/s": 2, reads: 1}
    assert any("scaled_dot_product" in event["name"] for event in json.loads(trace.read_text())["traceEvents"])


def test_the_products_alone_are_all_of_the_step_s():
    config, world = tiny("stream.lanes=2", "train_vavae.batch_size=2"), World()
    turns = {}
    lightningdit._add_turns(turns, "eager", config, world)
    products = lightningdit._Products(config, turns["eager"].step.model, world)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        products()
    step = config.train_lightningdit.batch_size * training_flops(config, "train_lightningdit")
    # The embedding of patches, a convolution, is none of them; the step differentiates no input of the first layers.
    assert counter.get_total_flops() == pytest.approx(step, rel=0.03)


def test_steps_with_other_losses_are_not_measured():
    turns = {"a": SimpleNamespace(first={"loss": 1.0}), "b": SimpleNamespace(first={"loss": 1.0 + 2e-5})}
    assert_equal_steps(turns, 1e-4)
    with pytest.raises(AssertionError, match="loss of b"):
        assert_equal_steps(turns, 1e-5)


def test_a_peer_of_other_outputs_is_not_measured(monkeypatch):
    build = lightningdit._public_network

    def scaled(config, name):
        network = build(config, name)
        return network.register_forward_hook(lambda module, inputs, output: 1.01 * output) and network

    monkeypatch.setattr(lightningdit, "_public_network", scaled)
    with pytest.raises(UserError, match=r"its loss is .* with our weights"):
        lightningdit.lightningdit_benchmark(tiny(), World(), ["eager"], PEER)


def test_a_peer_without_a_weight_of_ours_is_refused(monkeypatch):
    build = lightningdit._public_network

    def renamed(config, name):
        network = build(config, name)
        network.more = torch.nn.Linear(1, 1)
        return network

    monkeypatch.setattr(lightningdit, "_public_network", renamed)
    with pytest.raises(UserError, match=r"more\.\w+ is a weight of one network alone"):
        lightningdit.lightningdit_benchmark(tiny(), World(), ["eager"], PEER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train-lightningdit", "--sides", "eager,quick"], "'quick' is none of compiled, eager, DeepSpeed"),
        (["train-lightningdit", "--sides", "eager", "--peer", "nowhere:Model", *TINY], "give module:Class"),
        (["sample", *TINY, "solver.name=heun"], "set solver.name=euler"),
        (
            ["train-lightningdit", "--sides", "eager", "--peer", PEER, *TINY, ROUTING],
            "leave out lightningdit.routing, or --peer",
        ),
        (["sample", *TINY, ROUTING, "guidance.routing_scale=2"], "leave out routing_scale and path_drop"),
        (["latents", *REPRESENTATION], "kind=representation: vavae bench latents measures tokenizers of kind kl"),
        (["train-vavae", "--device", "cuda"], "torch finds no GPU here"),
        ([], "name a benchmark"),
        (["--gpu-table", "metrics"], "leave metrics out"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_tokenizer_s_sides_measure_their_weights_as_often_as_they_say(monkeypatch):
    measured = []
    hold = objective._measure_vf
    monkeypatch.setattr(objective, "_measure_vf", lambda *arguments: measured.append(1) or hold(*arguments))
    counts = {}
    for found in tokenizer.tokenizer_benchmarks(tiny(), World()):
        assert found.pairs == [(tokenizer.EXACT, tokenizer.CONSTANT), (tokenizer.REFRESHED, tokenizer.CONSTANT)]
        for name, side in found.sides.items():
            measured.clear()
            side.turn()
            counts[" ".join(found.name.split()[2:4]).rstrip(","), name] = len(measured)
    expected = {tokenizer.EXACT: 8, tokenizer.REFRESHED: 1, tokenizer.CONSTANT: 0}
    assert counts == {(f"{word} adversary", name): n for word in ("without", "with") for name, n in expected.items()}


def test_flops_are_counted_for_the_work_of_a_turn(monkeypatch):
    counted = []
    for module in (lightningdit, tokenizer, extraction, sampling):
        monkeypatch.setattr(module, "build_side", lambda build, flops, device: counted.append(flops()) or build())
    for module, name in ((lightningdit, "training"), (tokenizer, "training"), (extraction, "encoding")):
        monkeypatch.setattr(module, f"{name}_flops", lambda config, *job: config.losses.adaptive.every)
    monkeypatch.setattr(sampling, "velocity_flops", lambda config: 1)
    monkeypatch.setattr(sampling, "decoding_flops", lambda config: 100)
    config = tiny()
    lightningdit.lightningdit_benchmark(config, World(), ["eager"])
    assert counted == [4, 4], "a step of four images"
    counted.clear()
    next(tokenizer.tokenizer_benchmarks(config, World()))
    assert counted == [8, 8 * 8, 8 << 30], "eight steps of one image"
    counted.clear()
    with extraction.extraction_benchmark(config, CPU, 2):
        assert counted == [4, 4, 0], "two images and their mirror images"
    counted.clear()
    sampling.sampling_benchmark(config, CPU)
    assert counted == [2 * (1 + 2 + 100)] * 3, "two images, two steps, of which the second is guided"


def test_extraction_and_sampling_are_measured_where_their_slow_sides_agree(monkeypatch):
    config = tiny()
    with extraction.extraction_benchmark(config, CPU, 2) as found:
        assert found.images == 2
        assert set(found.sides) == {extraction.EXTRACTION, extraction.ENCODER, extraction.DECODER}
    encode = extraction._encode
    monkeypatch.setattr(extraction, "_encode", lambda *arguments: encode(*arguments) + 1)
    with pytest.raises(AssertionError), extraction.extraction_benchmark(config, CPU, 2):
        pass
    found = sampling.sampling_benchmark(config, CPU)
    assert set(found.sides) == {sampling.SAMPLER, sampling.TWO_PASSES, sampling.NETWORKS}
    monkeypatch.setattr(sampling, "_in_two_passes", lambda *arguments: torch.zeros(2, 3, 16, 16))
    with pytest.raises(AssertionError, match="other images"):
        sampling.sampling_benchmark(config, CPU)


def test_rates_and_shares_follow_from_the_wall_s_clock(monkeypatch):
    clocks = {"wall": 0.0, "processor": 0.0}
    monkeypatch.setattr(computation.time, "perf_counter", lambda: clocks["wall"])
    monkeypatch.setattr(computation.time, "process_time", lambda: clocks["processor"])

    def turn(wall, processor):
        clocks["wall"] += wall
        clocks["processor"] += processor

    sides = {"a": Side(lambda: turn(2, 4), 8e12, 0), "b": Side(lambda: turn(1, 4), 8e12, 0)}
    work = Computation("x", 10, sides, [("a", "b")], CPU, 16e12)
    found = measure(work, 3)
    assert {each.unit: (each.values["a"][0], each.values["b"][0]) for each in found} == {
        "s of processor": (4, 4),
        "s on the wall": (2, 1),
        "img/s": (5, 10),
        "TFLOP/s": (4, 8),
        "of peak": (0.25, 0.5),
    }
    assert cells(side_table(found).splitlines())[1][:3] == ["a", "4 (4 to 4)", "2 (2 to 2)"]
    assert cells(ratio_table(found, work.pairs).splitlines())[1] == ["a", "b", "1 (1 to 1)", "2 (2 to 2)"]


def test_the_peak_is_that_of_the_precision(monkeypatch):
    assert dense_peak(CPU, "fp32", tf32=True) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda", 0)
    peaks = [dense_peak(gpu, "bf16", True), dense_peak(gpu, "fp32", True), dense_peak(gpu, "fp32", False)]
    assert peaks == pytest.approx([989.4e12, 494.7e12, 66.9e12])


def event(name, start, length, category="cpu_op"):
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": length}


def test_waits_are_counted_within_the_turn_and_collectives_by_their_kernels():
    turn = event("vavae: one turn", 100, 50, "user_annotation")
    inside = [event("cudaStreamSynchronize", 110, 5, "cuda_runtime")] * 3
    after = event("cudaDeviceSynchronize", 160, 5, "cuda_runtime")
    reads = [event("aten::_local_scalar_dense", 109, 7)] * 4
    exchange = [event("nccl:all_reduce", 120, 2), event("ncclDevKernel_AllReduce_Sum", 130, 20, "kernel")]
    found = read_trace([turn, *inside, after, *reads, *exchange], 100e-6)
    assert found == TurnProfile({"cudaStreamSynchronize": 3}, pytest.approx(0.2))
    assert read_trace([turn, *reads], 100e-6) == TurnProfile({"aten::_local_scalar_dense": 4}, 0)


def test_reads_of_values_are_found_in_a_trace(tmp_path):
    found = profile_turn(lambda: [torch.ones(1).item() for _ in range(3)], CPU, tmp_path / "trace.json")
    assert found == TurnProfile({"aten::_local_scalar_dense": 3}, 0)


def share_of_communication(world):
    config = tiny("stream.lanes=2", "train_vavae.batch_size=2")
    (found,) = measure_all([lightningdit.lightningdit_benchmark(config, world, ["eager"])], 1, world)
    (measurement,) = [each for each in found.measurements if each.unit == "communication"]
    return measurement.values["eager"]


@pytest.mark.gloo
def test_ranks_measure_the_share_of_their_exchange(gloo: GlooLauncher):
    for (share,) in gloo.run(2, share_of_communication):
        assert 0 < share < 1


def test_results_are_compared_with_earlier_ones_of_the_same_command(tmp_path, capsys):
    def results(command, value, benchmark="x", machine="here"):
        measurement = Measurement(benchmark, "s", {"a": (value, value, 4 * value)})
        return BenchmarkResults.of(command, machine, [measurement])

    file = tmp_path / "before.json"
    results("sample", 2.0).write(file)
    earlier = BenchmarkResults.read(file, "sample")
    table = results("sample", 3.0).compared_with(earlier, file)
    assert cells(table.splitlines())[1:] == [["x", "a", "s", "2", "3", "1.500"]]
    assert "another machine, here" in results("sample", 3.0, machine="there").compared_with(earlier, file)
    with pytest.raises(command.UserError, match="of other sizes"):
        results("sample", 3.0, "y").compared_with(earlier, file)
    assert main(["bench", "latents", "--compare", str(file)]) == 2
    assert "has the results of `vavae bench sample`" in capsys.readouterr().err
    file.write_text("{}")
    assert main(["bench", "latents", "--compare", str(file)]) == 2
    assert "no results of a benchmark" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_none(value):
    with pytest.raises(UserError, match=rf"^x: a has 1.0, {value} s, which is no result; measure it again$"):
        BenchmarkResults.of("sample", "here", [Measurement("x", "s", {"a": (1.0, value)})])


@pytest.mark.parametrize(
    ("part", "error"),
    [
        (Part("x", 60, int, ("many",)), "ValueError: invalid literal for int() with base 10: 'many'"),
        (Part("x", 0.2, time.sleep, (60,)), "TimeoutError: not done within 0.2 s"),
        (Part("x", 60, os._exit, (3,)), "ChildProcessError: ended with status 3 and without a result"),
    ],
)
def test_a_part_of_the_table_that_fails_says_so_in_its_row(part, error):
    assert rows_of(part) == [("x", f"failed: {error}", *[""] * 7)]


def test_the_parts_of_a_gpu_s_table_take_less_than_ten_minutes():
    assert sum(part.seconds for part in parts(on_gpu=True)) < 600
    for part in parts(on_gpu=True):
        if part.function not in (gpu_table._checkpoint, gpu_table._data, gpu_table._metrics):
            load(RunConfig, *part.arguments[:2])


def test_the_table_of_a_gpu_comes_out_on_a_cpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "table.md"
    assert main(["bench", "--gpu-table", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    rows = cells(printed.splitlines())
    assert "failed" not in printed
    names = [row[0] for row in rows]
    for start in ("LightningDiT step", "tokenizer step without", "tokenizer step with adversary", "extraction"):
        assert any(name.startswith(start) for name in names), start
    assert {"tar records", "JPEG batches", "checkpoint of 11 MiB", "moments of 200"} <= set(names)
