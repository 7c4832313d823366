"""The Kubernetes file: against the fields of KubeRay, the schemas of Kubernetes, and what the project promises."""

import json
import re
from copy import deepcopy
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from vavae.config import load
from vavae.runs.config import RunConfig
from vavae.sweep.sweep import Sweep

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster/kuberay/vavae.yaml").read_text()
SCHEMA = json.loads((Path(__file__).parent / "kuberay_v1.schema.json").read_text())
KUBERNETES = "1.34"


def items_of(text=TEXT):
    return yaml.safe_load(text)["items"]


def named(kind, name=None, items=None):
    """The items of a kind, by name, or one of them."""
    found = {item["metadata"]["name"]: item for item in items or items_of() if item["kind"] == kind}
    return found if name is None else found[name]


def groups_of(cluster_spec):
    """Head and workers by the name of their group."""
    workers = {group["groupName"]: group for group in cluster_spec["workerGroupSpecs"]}
    return {"head": cluster_spec["headGroupSpec"], **workers}


def clusters_of(items):
    """The description of every cluster in the file."""
    return [
        item["spec"] if item["kind"] == "RayCluster" else item["spec"]["rayClusterSpec"]
        for item in items
        if item["kind"] in ("RayCluster", "RayJob")
    ]


def check(items):
    """Everything that the API servers would refuse."""
    for item in items:
        if item["apiVersion"] == "ray.io/v1":
            jsonschema.validate(item, SCHEMA)
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
    cluster, *others = clusters_of(items)
    plain = {key: value for key, value in cluster.items() if key != "suspend"}
    assert all(other == plain for other in others), "all jobs share one description of their cluster"
    for group in groups_of(cluster).values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **deepcopy(group["template"])}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_it_is_valid():
    check(items_of())


def test_it_is_valid_with_efa():
    text = re.sub(r"#efa ", "", TEXT)
    limits = groups_of(clusters_of(items_of(text))[0])["gpu"]["template"]["spec"]["containers"][0]["resources"][
        "limits"
    ]
    assert limits["vpc.amazonaws.com/efa"] == 32
    check(items_of(text))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("groupName: gpu\n", "groupNames: gpu\n"),
        ("maxReplicas: 8", "maxReplicas: many"),
        ('num-cpus: "0"', "num-cpus: 0"),
        ("version: v2", "version: v3"),
        ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"),
        ("mountPath: /cache", "mountpath: /cache"),
        ("minAvailable: 10000", "minAvailable: [1]"),
        ("emptyDir: {sizeLimit: 450Gi}", "emptyDir: {size: 450Gi}"),
        ("terminationGracePeriodSeconds: 120", "terminationGracePeriodSeconds: 2m"),
    ],
)
def test_mistakes_are_found(right, wrong):
    assert right in TEXT
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(items_of(TEXT.replace(right, wrong)))


def test_there_is_a_job_for_every_module():
    jobs = {name.replace("-", "_"): job["spec"]["entrypoint"] for name, job in named("RayJob").items()}
    assert jobs.keys() == {path.stem for path in (ROOT / "ray_jobs").glob("[a-z]*.py")}
    sweep = "python -m ray_jobs.tune_vf --config $VAVAE_SWEEP $VAVAE_SWEEP_SETTINGS"
    assert jobs.pop("tune_vf") == sweep
    for module, entrypoint in jobs.items():
        assert entrypoint == f"python -m ray_jobs.{module} --config $VAVAE_CONFIG $VAVAE_SETTINGS"


def test_jobs_wait_to_be_started_and_clean_up_and_are_tried_again():
    for job in named("RayJob").values():
        spec = job["spec"]
        assert spec["suspend"]
        assert spec["shutdownAfterJobFinishes"]
        assert spec["ttlSecondsAfterFinished"] > 0
        assert spec["backoffLimit"] > 0
    assert named("RayCluster", "vavae")["spec"]["suspend"]


def test_the_settings_are_those_of_a_run():
    data = named("ConfigMap", "vavae-run")["data"]
    config = load(RunConfig, ROOT / data["VAVAE_CONFIG"], data["VAVAE_SETTINGS"].split())
    assert config.workers.use_gpu
    assert config.workers.wait_for_nodes
    assert config.storage.root.startswith("s3://")
    groups = groups_of(clusters_of(items_of())[0])
    gpus = sum(groups[name]["maxReplicas"] * 8 for name in ("gpu", "gpu-spot"))
    assert config.workers.count <= gpus
    for name in ("cpu", "gpu", "gpu-spot"):
        pod = groups[name]["template"]["spec"]
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "cache")
        assert config.storage.cache_bytes < int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) << 30
        assert pod["containers"][0]["volumeMounts"] == [{"name": "cache", "mountPath": config.storage.cache}]
        requests = pod["containers"][0]["resources"]["requests"]
        if name != "cpu":
            assert 8 * config.workers.cpus <= requests["cpu"]


def test_the_settings_of_the_sweep_are_those_of_a_sweep():
    data = named("ConfigMap", "vavae-run")["data"]
    sweep = Sweep.load(ROOT / data["VAVAE_SWEEP"], data["VAVAE_SWEEP_SETTINGS"].split())
    for run in sweep.runs(sweep.space.examples()[0]):
        assert run.config.storage.cache == "/cache"
        assert run.config.workers.use_gpu


def test_nothing_runs_on_the_head_and_no_machine_is_kept():
    for cluster in clusters_of(items_of()):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["enableInTreeAutoscaling"]
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert [group["minReplicas"] for group in cluster["workerGroupSpecs"]] == [0, 0, 0]


def test_pods_are_nobody_special():
    for group in groups_of(clusters_of(items_of())[0]).values():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"secretRef": {"name": "vavae-s3", "optional": True}} in container["envFrom"]


def test_clusters_ask_for_a_token():
    assert all(cluster["authOptions"] == {"mode": "token"} for cluster in clusters_of(items_of()))


def test_budgets_hold_heads_and_paid_machines_and_let_spot_go():
    groups = groups_of(clusters_of(items_of())[0])
    own = {name: {**group["template"]["metadata"]["labels"], "ray.io/group": name} for name, group in groups.items()}
    own["head"]["ray.io/node-type"] = "head"  # as KubeRay labels them
    held = {
        name
        for name, labels in own.items()
        for budget in named("PodDisruptionBudget").values()
        if budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    }
    assert held == {"head", "gpu"}


def test_a_spot_machine_drains_within_its_grace():
    spot = groups_of(clusters_of(items_of())[0])["gpu-spot"]["template"]["spec"]
    command = spot["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    deadline, sleep = (int(number) for number in re.findall(r"seconds (\d+) && sleep (\d+)", command)[0])
    assert sleep < deadline < spot["terminationGracePeriodSeconds"]
    paid = groups_of(clusters_of(items_of())[0])["gpu"]["template"]["spec"]
    assert "lifecycle" not in paid["containers"][0]
    assert spot["containers"][0]["resources"] == paid["containers"][0]["resources"]
