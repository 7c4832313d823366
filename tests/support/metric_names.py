"""What a job's figures are called where Prometheus finds them."""

from vavae.training.logging.metric_names import JOB_METRICS, METRICS, MetricInfo, metric_name

OF_NODES = frozenset(
    f"ray_node_{name}" for name in ("cpu_utilization", "mem_used", "network_receive_speed", "network_send_speed")
)
"""Metrics of Ray itself that the dashboard shows."""


def exported_name(name: str, column: MetricInfo) -> str:
    """Ray puts its own name in front of all metrics, and a suffix behind counters."""
    return f"ray_{metric_name(name)}" + ("_total" if column.adds_up else "")


EXPORTED = frozenset(exported_name(name, column) for name, column in (METRICS | JOB_METRICS).items())
"""Names of all figures that jobs show."""
