"""What the agent says of a deployment, and what it stores of it, so that both change together."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from msgspec.structs import replace

from nodeagent.engines import DEEPEST_LEVEL
from nodeagent.runtimes import RunningEngine
from nodeagent.supervisor._planning import usual_s
from nodeagent.supervisor._records import KEPT_TIMES, EngineRecord, Records
from nodeagent.supervisor._residency import require_edge
from rung.types import Deployment, Endpoint, EndpointScope, FailureReason, Residency, TransitionTimes

_RISING = frozenset({Residency.STARTING, Residency.WAKING})
_SLEEPS = frozenset({Residency.FALLING_ASLEEP, Residency.ASLEEP, Residency.WAKING})


def endpoint_at(base_url: str, declared: EndpointScope) -> Endpoint:
    """An engine's endpoint with the scope that the agent's owner declared.

    A loopback address is never more than that: on another machine it leads to whatever listens there.
    """
    host = urlsplit(base_url).hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return Endpoint(base_url, EndpointScope.LOOPBACK if loopback else declared)


class DeploymentState:
    """One deployment: its record, which survives the agent, and the deployment as everybody sees it."""

    def __init__(
        self,
        record: EngineRecord,
        *,
        records: Records,
        scope: EndpointScope,
        on_change: Callable[[], None],
    ) -> None:
        self.record = record
        self.deployment = Deployment(
            spec=record.spec,
            residency=Residency.STOPPED,
            generation=record.generation,
            adopted=record.adopted,
            residency_time_s=time.time(),
        )
        #: Set while no request runs.
        self.idle = asyncio.Event()
        self.idle.set()
        self.deployment = replace(
            self.deployment,
            usual_times=self._usual_times(),
            awake_expected_s=self._awake_expected_s(Residency.STOPPED, None),
        )
        self._records = records
        self._scope = scope
        self._on_change = on_change

    @property
    def id(self) -> str:
        """The deployment's id."""
        return self.record.spec.id

    @property
    def residency(self) -> Residency:
        """Where the weights are."""
        return self.deployment.residency

    def show(
        self,
        residency: Residency,
        detail: str,
        *,
        load_percent: float | None = None,
        remaining_s: float | None = None,
        failure_reason: FailureReason | None = None,
    ) -> None:
        """Say how the deployment is; nothing is stored. Raises as `require_edge`.

        `remaining_s` is the time until this residency is expected to end; None if that is not known.
        """
        current = self.deployment
        require_edge(current.residency, residency)
        running = self.record.running
        has_endpoint = running is not None and residency is not Residency.STOPPED
        self.deployment = replace(
            current,
            spec=replace(self.record.spec, residency_class=self.record.residency_class),
            residency=residency,
            detail=detail,
            endpoint=endpoint_at(running.base_url, self._scope) if running and has_endpoint else None,
            load_percent=load_percent,
            failure_reason=failure_reason,
            generation=self.record.generation,
            adopted=self.record.adopted,
            pid=running.pid if running else 0,
            container_id=running.container_id if running else "",
            asleep_level=self.record.sleep_level if residency in _SLEEPS else 0,
            shrunk=self.record.shrunk and residency in _SLEEPS,
            kv_cache_bytes=self.record.kv_cache_bytes,
            awake_expected_s=self._awake_expected_s(residency, remaining_s),
            usual_times=self._usual_times(),
            residency_time_s=current.residency_time_s if residency is current.residency else time.time(),
        )
        self._on_change()

    def save(self, residency: Residency) -> None:
        """Store the record with this residency."""
        self.record = replace(self.record, residency=residency)
        self._records.save(self.record)

    def delete(self) -> None:
        """Remove the record from the disk."""
        self._records.delete(self.id)

    def awake(self) -> None:
        """It answers requests."""
        self.record = replace(self.record, sleep_level=0, shrunk=False)
        self.show(Residency.AWAKE, "ready")
        self.save(Residency.AWAKE)

    def asleep(self, detail: str) -> None:
        """It sleeps, at the level of its record, or is shrunk."""
        self.show(Residency.ASLEEP, detail)
        self.save(Residency.ASLEEP)

    def stopped(self, detail: str) -> None:
        """Its engine does not run."""
        self.show(Residency.STOPPED, detail)
        self.save(Residency.STOPPED)

    def failed(self, reason: FailureReason, detail: str) -> None:
        """Its engine does not run, and should."""
        self.show(Residency.FAILED, detail, failure_reason=reason)
        self.save(Residency.FAILED)

    def ended(self) -> None:
        """Note that the engine is gone. What it printed can still be read."""
        running = self.record.running
        last_run = running if has_process(running) else self.record.last_run
        self.record = replace(
            self.record, running=None, last_run=last_run, sleep_level=0, shrunk=False, kv_cache_bytes=None
        )

    def took(self, transition: str, time_s: float) -> None:
        """Note how long a sleep or a wake took; it is stored with whatever is stored next."""
        known = self.record.transition_times_s
        times_s = (*known.get(transition, ()), time_s)[-KEPT_TIMES:]
        self.record = replace(self.record, transition_times_s={**known, transition: times_s})

    def usual_s(self, transition: str) -> float | None:
        """How long such a sleep or wake of this deployment usually takes; None before the first."""
        return usual_s(self.record.transition_times_s.get(transition, ()))

    @property
    def way_back(self) -> str:
        """What waking it from where it sleeps is called among the times."""
        return "grow" if self.record.shrunk else f"wake {self.record.sleep_level or DEEPEST_LEVEL}"

    def _awake_expected_s(self, residency: Residency, remaining_s: float | None) -> float | None:
        """How long until it is awake; None when it is, or nobody knows."""
        if residency in _RISING:
            return remaining_s
        if residency is Residency.ASLEEP:
            return self.usual_s(self.way_back)
        if residency in (Residency.STOPPED, Residency.FAILED):
            return usual_s(self.record.load_times_s)
        return None

    def _usual_times(self) -> TransitionTimes:
        return TransitionTimes(
            start_s=usual_s(self.record.load_times_s),
            sleep_s=self.usual_s("sleep 1"),
            wake_s=self.usual_s("wake 1"),
            discard_s=self.usual_s("sleep 2"),
            reload_s=self.usual_s("wake 2"),
            shrink_s=self.usual_s("shrink"),
            grow_s=self.usual_s("grow"),
        )

    def count(self, change: int) -> None:
        """Add to the running requests.

        Not told to anybody: the control plane keeps its own count, and this is the path of every request.
        """
        active = self.deployment.active_requests + change
        self.deployment = replace(self.deployment, active_requests=active)
        if active:
            self.idle.clear()
        else:
            self.idle.set()

    def measured(self, vram_bytes: int | None) -> None:
        """Note the memory that telemetry found for its engine."""
        if vram_bytes != self.deployment.vram_bytes:
            self.deployment = replace(self.deployment, vram_bytes=vram_bytes)
            self._on_change()


def has_process(running: RunningEngine | None) -> bool:
    """Whether it has come to a process or a container of ours: not if it is only about to be started."""
    return running is not None and bool(running.pid or running.container_id)
