"""An engager over deployments and cloud models that answer what a test tells them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from msgspec.structs import replace

from controlplane.fleet import DeploymentView, NodeSchedulers, log_alert
from controlplane.ladder import Candidate, Circuits, Modality, RungSpec, TargetKind, build_ladder
from controlplane.pipelines import Slots
from controlplane.pipelines._engage import Engager
from controlplane.pipelines._engaged import Engaged
from controlplane.pipelines._router import Judged, Router
from controlplane.pipelines._wish import Wish
from rung.errors import EngineStartFailedError, RungError
from rung.service import EngineClient, Signal
from rung.types import JobKind, LifecycleProgress, Phase, Policy, Priority, Residency, Served
from tests.fakes.fleet_view import FakeFleet, deployment_view


@dataclass
class Said:
    """A job that remembers what it was told."""

    id: str = "job-1"
    model: str = "rung/auto"
    lines: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    spent_usd: float = 0.0
    told: Signal = field(default_factory=Signal)

    async def until(self, text: str, times: int = 1) -> None:
        """Return once it was told something with this text so often."""
        async with asyncio.timeout(60):
            while sum(text in line for line in self.lines) < times:
                await self.told.wait()

    def progress(
        self,
        phase: Phase,
        detail: str = "",
        *,
        percent: float | None = None,
        remaining_s: float | None = None,
    ) -> None:
        self.lines.append(detail)
        self.told.fire()

    def begin_generating(self, served: Served) -> None:
        self.served.append(served.target)

    def spent(self, cost_usd: float) -> None:
        self.spent_usd += cost_usd


@dataclass
class AReply:
    """An answer of a status."""

    status: int = 200
    body: bytes = b"{}"
    retry_after: str = ""
    content_type: str = "text/event-stream"
    cost_usd: float = 0.0
    closed: bool = False

    async def chunks(self, interval_s: Callable[[], float] | None = None) -> AsyncIterator[bytes]:
        yield self.body

    async def read(self) -> bytes:
        return self.body

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True


class Answers:
    """What each target answers; who is not in `of` answers well. `asked` is who was asked, in order."""

    def __init__(self) -> None:
        self.of: dict[str, AReply | RungError] = {}
        self.asked: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        #: Somebody waits at a gate.
        self.held = asyncio.Event()

    async def give(self, target: str) -> AReply:
        self.asked.append(target)
        if target in self.gates:
            self.held.set()
            await self.gates[target].wait()
        found = self.of.get(target) or AReply()
        if isinstance(found, RungError):
            raise found
        return found


class Engines(EngineClient):
    """Engines whose answers a test writes."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    async def post(self, url: str, body: bytes, *, what: str, idle_timeout_s: float, **_: Any) -> Any:
        return await self._answers.give(what)


class ACloud:
    """Cloud models whose answers a test writes."""

    def __init__(self, answers: Answers, *names: str) -> None:
        self._answers = answers
        self.candidates: Mapping[str, Candidate] = {
            name: Candidate(
                id=name, kind=TargetKind.CLOUD, owned=False, capabilities=frozenset({"chat"}), state="a model"
            )
            for name in names
        }

    def refusal(self, target_id: str) -> str:
        return ""

    def model_name(self, target_id: str) -> str:
        return target_id.rpartition("/")[2]

    async def open(self, target_id: str, body: bytes, *, stream: bool, idle_timeout_s: float) -> AReply:
        return await self._answers.give(target_id)


class WakingFleet(FakeFleet):
    """Deployments come up when they may; `raised` is who was asked to."""

    def __init__(self, *views: DeploymentView) -> None:
        super().__init__(*views)
        self.raised: list[str] = []
        self.woken = asyncio.Event()
        self.may_wake = asyncio.Event()
        self.may_wake.set()

    async def ensure_awake(self, deployment_id: str) -> AsyncIterator[LifecycleProgress]:  # type: ignore[override]  # a script needs no generator's `send`
        self.raised.append(deployment_id)
        yield LifecycleProgress(Residency.WAKING, detail="waking")
        await self.may_wake.wait()
        if self.refuse_start:
            raise EngineStartFailedError(self.refuse_start, deployment=deployment_id)
        self.put(deployment_id, Residency.AWAKE)
        self.woken.set()

    def put(self, name: str, residency: Residency) -> None:
        """Show a deployment in this state."""
        views = dict(self.view.deployments)
        before = views[name].deployment
        view = deployment_view(name, f"http://{name}", slots=1, residency=residency)
        comes_up = residency is Residency.AWAKE and before.residency is not Residency.AWAKE
        deployment = replace(view.deployment, generation=before.generation + comes_up)
        views[name] = replace(view, deployment=deployment)
        self.show(*views.values())


class Place:
    """An engager over the deployments `near` and `far` and the cloud models `c/0`, `c/1` …, in this order."""

    def __init__(self, *, deployments: int = 2, models: int = 1) -> None:
        names = ["near", "far"][:deployments]
        self.fleet = WakingFleet(*(deployment_view(name, f"http://{name}", slots=1) for name in names))
        self.slots = Slots()
        self.now_s = 1000.0
        self.circuits = Circuits(jitter=lambda: 1.0)
        self.answers = Answers()
        models_ = [f"c/{place}" for place in range(models)]
        cloud = ACloud(self.answers, *models_)
        rung = RungSpec(name="all", modality=Modality.CHAT, chain="all")
        self.router = Router(
            fleet=self.fleet,
            slots=self.slots,
            circuits=self.circuits,
            ladder=build_ladder([rung], {"all": [*names, *models_]}),
            cloud=cloud,
            classify=lambda _: Judged(3),
            now_s=lambda: self.now_s,
        )
        self.engager = Engager(
            fleet=self.fleet,
            schedulers=NodeSchedulers(self.fleet, idle_s=self.slots.idle_s, alert=log_alert),
            slots=self.slots,
            client=Engines(self.answers),
            router=self.router,
            circuits=self.circuits,
            cloud=cloud,
            engine_idle_timeout_s=1.0,
            now_s=lambda: self.now_s,
            # 18:49:37 on 21 November 2026.
            unix_s=lambda: 1_795_286_977.0,
        )
        self.job = Said()

    def lies(self, name: str, residency: Residency) -> None:
        """A deployment is in this state; it can be made awake."""
        self.fleet.put(name, residency)

    async def ask(self, policy: Policy | None = None, model: str = "rung/auto") -> Engaged:
        wish = Wish(
            kind=JobKind.CHAT, model=model, body=b"{}", policy=policy or Policy(priority=Priority.USER)
        )
        targets = self.router.choose(self.router.route(wish))
        return await self.engager.engage(self.job, wish, targets, stream=True)

    async def answered_by(self, policy: Policy | None = None) -> str:
        async with await self.ask(policy) as engaged:
            return engaged.target
