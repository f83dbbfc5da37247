"""Memory that runs low: told in the log, in the metrics, and to those who watch the fleet."""

from __future__ import annotations

import time
from collections.abc import Iterator

import structlog
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from controlplane.fleet._fleet import Fleet
from controlplane.vram import VramAlert
from rung.types import MemoryAlert

_log = structlog.get_logger("rung.vram")


class MemoryAlerts(Collector):
    """Takes the schedulers' alerts, which have a hysteresis, and shows them; collects the GPUs' gauges."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def __call__(self, alert: VramAlert) -> None:
        """A GPU's memory runs low, or has recovered."""
        log_alert(alert)
        self._fleet.note_alert(
            MemoryAlert(
                gpu=alert.pool_id,
                low=alert.low,
                free_bytes=alert.free_bytes,
                limit_bytes=alert.limit_bytes,
                time_s=time.time(),
            )
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Free bytes of each GPU that is heard of, and whether they are low."""
        labels = ["node", "gpu"]
        free = GaugeMetricFamily("rung_gpu_free_bytes", "Free memory of a GPU.", labels=labels)
        low = GaugeMetricFamily(
            "rung_gpu_low_memory",
            "1 while the free memory of a GPU is low.",
            labels=labels,
        )
        alerts = self._fleet.alerts
        for node in self._fleet.view.nodes.values():
            for gpu in node.status.gpus if node.status is not None else ():
                alert = alerts.get(f"{node.id}/{gpu.index}")
                free.add_metric([node.id, str(gpu.index)], gpu.memory_free_bytes)
                low.add_metric([node.id, str(gpu.index)], int(alert is not None and alert.low))
        yield free
        yield low


def log_alert(alert: VramAlert) -> None:
    """Write an alert to the log."""
    level = _log.warning if alert.low else _log.info
    level(
        "vram_low" if alert.low else "vram_recovered",
        pool=alert.pool_id,
        free_bytes=alert.free_bytes,
        limit_bytes=alert.limit_bytes,
    )
