"""One node: dial its agent, follow what it says, and know when it is silent."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import aclosing

import structlog
from msgspec import Struct
from msgspec.structs import replace

from controlplane.fleet._agent_client import (
    AgentClient,
    AgentSnapshot,
    AgentUpdate,
    DeploymentRemoved,
)
from rung.errors import RungError, UnavailableError
from rung.service import Signal
from rung.types import Deployment, NodeState, NodeStatus

_log = structlog.get_logger("rung.fleet")

#: An agent speaks each second. After this long without a word its node is unreachable.
SILENCE_S = 5.0
#: It measures each second, too. What it measured longer ago than this says nothing of how the node is now.
OLD_MEASUREMENTS_S = 5.0
#: Bounds of the full-jitter backoff between two dials.
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0
#: A stream that lasted this long was good: the backoff starts from the bottom again.
_GOOD_STREAM_S = 1.0
#: A timer this late means that our own event loop was stalled, not the agents.
_STALL_S = 1.0
#: How long a message may have been on its way, which its sender cannot know.
_TRANSIT_S = 0.1
#: Age of measurements whose agent does not tell it: it measures once a second.
_USUAL_AGE_S = 0.8


class NodeReport(Struct, frozen=True, kw_only=True):
    """What is known of a node. `deployments` are by the ids that the agent uses.

    While the node is unreachable, `status` and `deployments` are the last ones heard. `status` may be old
    although the agent is heard: it goes on to speak of its engines when its measuring hangs.
    """

    state: NodeState = NodeState.CONNECTING
    detail: str = ""
    status: NodeStatus | None = None
    last_seen_time_s: float | None = None
    deployments: dict[str, Deployment] = {}
    agent_instance_id: str = ""
    measurements_are_old: bool = False


def backoff_s(failures: int, rng: random.Random) -> float:
    """Time to wait after so many failures in a row: full jitter under an exponential bound."""
    bound = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures, 16))
    return rng.uniform(0.0, bound)


class NodeSession:
    """Follows one agent for as long as `run` runs.

    A stream that breaks is dialled again; the node stays READY for `SILENCE_S` after the last word,
    so that an agent that restarts disturbs nobody. `on_change` is called after each change of
    `report`, with True when nothing but the measurements changed.
    """

    def __init__(
        self,
        *,
        node_id: str,
        address: str,
        epoch: int,
        on_change: Callable[[NodeSession, bool], None],
        rng: random.Random,
    ) -> None:
        self.node_id = node_id
        self.address = address
        self.report = NodeReport()
        #: When the newest measurements were begun, on the loop's clock.
        self.measured_s = float("-inf")
        self.connected = False
        self.changed = Signal()
        self._epoch = epoch
        self._on_change = on_change
        self._rng = rng
        self._client: AgentClient | None = None
        self._old_clients: list[AgentClient] = []
        self._silence: asyncio.TimerHandle | None = None
        self._aging: asyncio.TimerHandle | None = None

    @property
    def client(self) -> AgentClient:
        """The channel to the agent; a call on it fails soon if the agent is away."""
        if self._client is None:
            self._client = AgentClient(self.node_id, self.address)
        return self._client

    async def run(self) -> None:
        """Dial and follow, for ever."""
        loop = asyncio.get_running_loop()
        failures = 0
        self._heard()
        try:
            while True:
                began_s = loop.time()
                cause = await self._follow_once()
                good = self.connected and loop.time() - began_s >= _GOOD_STREAM_S
                failures = 0 if good else failures + 1
                self._lost(cause)
                await asyncio.sleep(backoff_s(failures, self._rng))
                self._redial()
        finally:
            for timer in (self._silence, self._aging):
                if timer is not None:
                    timer.cancel()
            for client in [*self._old_clients, *([self._client] if self._client else [])]:
                await client.aclose()

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the agent's snapshot is current; False when it was not within `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while not self.connected:
            if not await self.changed.wait(max(0.0, deadline_s - loop.time())):
                return False
        return True

    async def _follow_once(self) -> str:
        """Follow one stream to its end; says how it ended."""
        try:
            async with (
                asyncio.timeout(SILENCE_S) as silence,
                aclosing(self.client.watch(self._epoch)) as updates,
            ):
                loop = asyncio.get_running_loop()
                async for update in updates:
                    silence.reschedule(loop.time() + SILENCE_S)
                    self._apply(update)
        except RungError as error:
            return error.message
        except TimeoutError:
            return f"the agent said nothing for {SILENCE_S:g} s"
        except Exception as error:  # noqa: BLE001 - one bad message must not end the session for good
            _log.error("agent_stream_defect", node=self.node_id, exc_info=error)
            return f"its agent sent something that was not understood ({type(error).__name__})"
        return "the agent ended its stream"

    def _apply(self, update: AgentUpdate) -> None:
        if isinstance(update, AgentSnapshot) and update.node_id != self.node_id:
            raise UnavailableError(
                f"the agent at {self.address} calls itself {update.node_id!r}, but the configuration says "
                f"{self.node_id!r}; correct one of them",
                node=self.node_id,
            )
        if not self.connected and not isinstance(update, AgentSnapshot):
            raise UnavailableError(
                f"the agent at {self.address} did not begin with a snapshot", node=self.node_id
            )
        self._heard()
        was = self.report
        heard = replace(was, state=NodeState.READY, detail="", last_seen_time_s=time.time())
        only_status = False
        if isinstance(update, NodeStatus | AgentSnapshot):
            status = update if isinstance(update, NodeStatus) else update.status
            self.measured_s = asyncio.get_running_loop().time() - _age_s(status)
            # A stream that was dialled again begins with the newest sample, however old that is.
            if was.status is None or status.sample_time_s != was.status.sample_time_s:
                self._measured()
                heard = replace(heard, measurements_are_old=False)
        if isinstance(update, NodeStatus):
            fresh = was.measurements_are_old is heard.measurements_are_old
            only_status = fresh and was.state is NodeState.READY and _same_host(was.status, update)
            self.report = replace(heard, status=update)
        elif isinstance(update, Deployment):
            if self._is_stale(update):
                self.report = heard
            else:
                self.report = replace(heard, deployments=was.deployments | {update.spec.id: update})
        elif isinstance(update, DeploymentRemoved):
            left = {key: found for key, found in was.deployments.items() if key != update.deployment_id}
            self.report = replace(heard, deployments=left)
        else:
            self.connected = True
            if was.state is not NodeState.READY:
                _log.info("node_ready", node=self.node_id, agent=update.agent_instance_id)
            self.report = replace(
                heard,
                status=update.status,
                deployments={found.spec.id: found for found in update.deployments},
                agent_instance_id=update.agent_instance_id,
            )
        self._tell(only_status)

    def _is_stale(self, deployment: Deployment) -> bool:
        known = self.report.deployments.get(deployment.spec.id)
        return known is not None and deployment.generation < known.generation

    def _heard(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
        loop = asyncio.get_running_loop()
        self._silence = loop.call_at(loop.time() + SILENCE_S, self._fell_silent, loop.time() + SILENCE_S)

    def _fell_silent(self, due_s: float) -> None:
        if asyncio.get_running_loop().time() - due_s > _STALL_S:
            # It was this process that stood still: what the agents said meanwhile is yet to be read.
            self._heard()
            return
        if self.report.state is NodeState.UNREACHABLE:
            return
        detail = self.report.detail or f"the agent said nothing for {SILENCE_S:g} s"
        _log.warning("node_unreachable", node=self.node_id, detail=detail)
        self.report = replace(self.report, state=NodeState.UNREACHABLE, detail=detail)
        self._tell(only_status=False)

    def _measured(self) -> None:
        if self._aging is not None:
            self._aging.cancel()
        loop = asyncio.get_running_loop()
        due_s = loop.time() + OLD_MEASUREMENTS_S
        self._aging = loop.call_at(due_s, self._grew_old, due_s)

    def _grew_old(self, due_s: float) -> None:
        if asyncio.get_running_loop().time() - due_s > _STALL_S:
            # As in `_fell_silent`.
            self._measured()
            return
        _log.warning("measurements_old", node=self.node_id, after_s=OLD_MEASUREMENTS_S)
        self.report = replace(self.report, measurements_are_old=True)
        self._tell(only_status=False)

    def _lost(self, cause: str) -> None:
        was_connected, self.connected = self.connected, False
        if was_connected:
            _log.info("agent_stream_lost", node=self.node_id, cause=cause)
        if was_connected or self.report.detail != cause:
            self.report = replace(self.report, detail=cause)
            self._tell(only_status=False)

    def _redial(self) -> None:
        # A fresh channel dials at once; the old one would first sit out gRPC's own backoff, and may
        # hang on a connection that is dead. Generations that still run on it are left alone.
        self._old_clients = [old for old in self._old_clients if not old.is_closed]
        if self._client is not None:
            self._client.retire()
            self._old_clients.append(self._client)
        self._client = None

    def _tell(self, only_status: bool) -> None:
        self._on_change(self, only_status)
        self.changed.fire()


def _age_s(status: NodeStatus) -> float:
    """Time since these measurements were begun, now that they are heard."""
    return (_USUAL_AGE_S if status.sample_age_s is None else status.sample_age_s) + _TRANSIT_S


def _same_host(before: NodeStatus | None, now: NodeStatus) -> bool:
    return before is not None and before.host_id == now.host_id
