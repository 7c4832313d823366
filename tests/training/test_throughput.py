"""Time, memory and checkpoints in a row of metrics, and the registry of metrics."""

import pytest
import torch
from support.gloo import GlooLauncher
from support.toy_training import ToyStep, train_toy

from vavae.distributed.world import World
from vavae.storage.storage import Storage
from vavae.training.logging import stopwatch
from vavae.training.logging.log import read_rows
from vavae.training.logging.metric_names import METRICS, metric_info, metric_name
from vavae.training.logging.stopwatch import Stopwatch
from vavae.training.logging.throughput import ThroughputMeter
from vavae.training.step import StepResult

CPU = torch.device("cpu")


def test_a_stopwatch_adds_up_phases_and_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5, 20.0, 21.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(moments))
    watch = Stopwatch(CPU)
    for phase in ("forward", "backward", "forward"):
        with watch(phase):
            pass
    assert watch.read() == {"forward": 1.5, "backward": 2.0}
    with watch("optimizer"):
        pass
    assert watch.read() == {"optimizer": 1.0}
    assert watch.read() == {}


@pytest.mark.gpu
def test_a_stopwatch_on_a_gpu_counts_what_the_gpu_does_and_waits_for_none_of_it() -> None:
    device, cycles = torch.device("cuda"), 200_000_000
    with Stopwatch(device)("warm-up"):
        torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    watch, host = Stopwatch(device), Stopwatch(CPU)
    with host("launch"), watch("long"):
        torch.cuda._sleep(cycles)
    with watch("short"):
        torch.cuda._sleep(cycles // 10)
    seconds = watch.read()
    assert seconds["long"] / seconds["short"] == pytest.approx(10, rel=0.3)
    assert host.read()["launch"] < seconds["long"] / 5


@pytest.mark.gpu
def test_rows_on_a_gpu_have_the_peak_of_their_own_interval() -> None:
    world = World(device=torch.device("cuda", 0))
    meter, rows = ThroughputMeter(world, Stopwatch(world.device)), []
    others = torch.cuda.memory_allocated()
    for size in (1 << 24, 1 << 20):
        torch.empty(size, dtype=torch.uint8, device=world.device)
        meter.add(StepResult({"loss/total": torch.ones((), device=world.device)}, {}), 1)
        rows.append(meter.row())
    assert rows[0]["gpu_memory/peak_bytes"] - others >= 1 << 24
    assert 1 << 20 <= rows[1]["gpu_memory/peak_bytes"] - others < 1 << 24
    assert rows[1]["gpu_memory/reserved_bytes"] >= 1 << 24


def test_rows_have_the_shares_of_a_step(storage: Storage) -> None:
    train_toy(storage, images=40, log_images=8)
    for row in read_rows(storage.child("log")):
        shares = [row[name] for name in ("data_wait", "forward", "backward", "optimizer")]
        assert min(shares) > 0
        assert sum(shares) < 1


def test_rows_after_a_checkpoint_say_what_it_took(storage: Storage) -> None:
    train_toy(storage, images=24, log_images=8, checkpoint_images=8)
    first, *later = read_rows(storage.child("log"))
    assert not [name for name in first if name.startswith("checkpoint")]
    weights = sum(tensor.nbytes for tensor in ToyStep().model.state_dict().values())
    for row in later:
        assert row["checkpoint/bytes"] == 4 * weights, "the weights, two moments and the average"
        assert 0 < row["checkpoint_wait"] < 1
        assert row["checkpoint/stall_seconds"] > 0


def saved_of_rank(world: World) -> list[float | None]:
    meter, found = ThroughputMeter(world, Stopwatch(world.device)), []
    for size in (0, 10 + world.rank, 0):
        meter.add(StepResult({"loss/total": torch.ones(())}, {}), 1)
        with meter.waiting("checkpoint_wait"):
            meter.saved(size)
        found.append(meter.row().get("checkpoint/bytes"))
    return found


def test_bytes_of_checkpoints_are_of_all_ranks(gloo: GlooLauncher) -> None:
    assert gloo.run(2, saved_of_rank) == [[None, 21, None]] * 2


def test_metrics_have_names_of_their_own_in_prometheus() -> None:
    assert metric_name("loss_at_timestep/0.3") == "vavae_loss_at_timestep_0_3"
    names = [metric_name(name) for name in METRICS]
    assert len({*names}) == len(names)
    assert metric_info("never/heard") == ("never/heard", False, False)
