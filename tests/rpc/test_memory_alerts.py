"""A GPU that runs low on memory is told to those who watch the fleet, in the metrics and in `rung status`."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from contextlib import aclosing

from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from rich.console import Console

from controlplane.fleet import MemoryAlerts
from rung import AsyncClient
from rung.cli.views import fleet_view
from rung.types import FleetSnapshot, Residency, ResidencyClass
from tests.fakes.agent_server import a_spec
from tests.fakes.api_server import an_api_server
from tests.fakes.gpu_agent import GIB, GpuAgent

SPEC = replace(a_spec("pinned", residency_class=ResidencyClass.PINNED), vram_bytes=20 * GIB)


async def until(client: AsyncClient, holds: Callable[[FleetSnapshot], bool]) -> FleetSnapshot:
    async with asyncio.timeout(15), aclosing(client.watch_fleet()) as snapshots:
        async for snapshot in snapshots:
            if holds(snapshot):
                return snapshot
    raise AssertionError("the watch ended")


async def test_low_memory_is_told_once_and_is_over_only_well_above_the_limit() -> None:
    card = GpuAgent([SPEC])
    card.put(SPEC, Residency.AWAKE)
    async with card.running(), an_api_server([card.agent], [SPEC]) as plane:
        registry = CollectorRegistry()
        registry.register(MemoryAlerts(plane.fleet))

        def gauge(name: str) -> float | None:
            return registry.get_sample_value(name, {"node": "box", "gpu": "0"})

        async with AsyncClient(f"127.0.0.1:{plane.server.port}") as client:
            snapshot = await until(client, lambda fleet: bool(fleet.nodes[0].status))
            assert snapshot.alerts == ()
            assert (gauge("rung_gpu_free_bytes"), gauge("rung_gpu_low_memory")) == (11 * GIB, 0)

            card.programs[4711] = 10 * GIB
            snapshot = await until(client, lambda fleet: bool(fleet.alerts))
            [alert] = snapshot.alerts
            assert (alert.gpu, alert.low, alert.free_bytes) == ("box/0", True, GIB)
            assert (gauge("rung_gpu_free_bytes"), gauge("rung_gpu_low_memory")) == (GIB, 1)
            # Whoever comes later is told too, in the snapshot.
            [later] = (await until(client, lambda _: True)).alerts
            assert later == alert
            assert "box/0 is low on memory: 1.0 GiB free, less than 2.0 GiB" in _shown(snapshot)

            card.programs[4711] = 9 * GIB - GIB // 4  # above the limit, and not well above it
            await until(client, lambda fleet: _free_bytes(fleet) > 2 * GIB)
            card.programs[4711] = 8 * GIB
            snapshot = await until(client, lambda fleet: not fleet.alerts)
            assert gauge("rung_gpu_low_memory") == 0
            assert "low on memory" not in _shown(snapshot)


def _free_bytes(snapshot: FleetSnapshot) -> int:
    status = snapshot.nodes[0].status
    assert status is not None
    return status.gpus[0].memory_free_bytes


def _shown(snapshot: FleetSnapshot) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(fleet_view(snapshot, now_s=0.0))
    return console.export_text()
