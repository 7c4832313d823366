"""Cluster files against Ray itself: its schema and defaults for `ray up`, and its command for draining a node."""

import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import drain_node

CLUSTER = Path(__file__).parents[2] / "cluster"


def prepared(cloud, **changes):
    return prepare_config({**yaml.safe_load((CLUSTER / f"ray_up/{cloud}.yaml").read_text()), **changes})


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_takes_it(cloud):
    config = prepared(cloud)
    validate_config(config)
    kinds = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert kinds["head"]["resources"]["CPU"] == 0
    assert {
        name: (kind["min_workers"], kind["resources"]["GPU"]) for name, kind in kinds.items() if name != "head"
    } == {
        "gpu": (0, 8),
        "gpu_spot": (0, 8),
    }
    spot, paid = kinds["gpu_spot"]["node_config"], kinds["gpu"]["node_config"]
    assert spot != paid
    assert [bool(re.search("spot", str(kind), re.I)) for kind in (spot, paid)] == [True, False]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
@pytest.mark.parametrize(
    "changes", [{"max_worker": 2}, {"available_node_types": {"head": {"node_config": {}}}}, {"docker": {"img": "a"}}]
)
def test_ray_up_refuses_mistakes(cloud, changes):
    with pytest.raises(Exception, match=r"max_worker|resources|img|validat"):
        validate_config(prepared(cloud, **changes))


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_machines_ask_for_a_token_and_watch_for_their_end(cloud):
    config = prepared(cloud)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/vavae/.ray/auth_token"].endswith(".ray/auth_token")
    assert any(f"drain.sh {cloud}" in command for command in config["worker_start_ray_commands"])
    assert any("--dashboard-host 127.0.0.1" in command for command in config["head_start_ray_commands"])


def test_ray_knows_how_nodes_are_drained():
    """Both files call its hidden command, whose options are not promised to stay."""
    options = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "text", "--deadline-remaining-seconds"]
    context = drain_node.make_context("drain-node", ["--address", "a", *options, "110"])
    assert context.params["deadline_remaining_seconds"] == 110
    for file in ("kuberay/vavae.yaml", "ray_up/drain.sh"):
        used = set(re.findall(r"--[a-z-]+", (CLUSTER / file).read_text().split("drain-node")[1].split("\n\n")[0]))
        assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= used
        assert used <= {option for parameter in drain_node.params for option in parameter.opts}
