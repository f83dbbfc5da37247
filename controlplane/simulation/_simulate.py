"""A trace lived through under each policy: same node, same requests, in virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from controlplane.simulation._baselines import (
    AllOrNothing,
    AllOrNothingAsleep,
    LeastRecentlyUsed,
    LeastRecentlyUsedAsleep,
    OneAtATime,
)
from controlplane.simulation._node import TraceNode
from controlplane.simulation._policy import Policy, Visit
from controlplane.simulation._pool import BrokenInvariantError
from controlplane.simulation._report import (
    Outcome,
    PolicyReport,
    SimulationReport,
    count_grades,
    summarise,
)
from controlplane.simulation._requests import Request, draw_requests
from controlplane.simulation._rung import RungPolicy
from controlplane.simulation._trace import Trace
from controlplane.simulation._virtual_time import run_in_virtual_time
from rung.errors import NotFoundError, RungError

#: By name, in the order in which they are shown.
POLICIES: dict[str, Callable[[TraceNode], Policy]] = {
    "rung": RungPolicy,
    "all-or-nothing": AllOrNothing,
    "lru": LeastRecentlyUsed,
    "one-at-a-time": OneAtATime,
    "all-or-nothing-sleep": AllOrNothingAsleep,
    "lru-sleep": LeastRecentlyUsedAsleep,
}
#: A request that has not ended so long after the last one came never will.
_LONGEST_S = 24 * 3600.0

#: Told the policy, and how many of its requests have ended.
OnProgress = Callable[[str, int, int], None]


def _ignore(policy: str, ended: int, requests: int) -> None:
    """Tell nobody."""


def simulate(
    name: str,
    trace: Trace,
    *,
    policies: Sequence[str] = tuple(POLICIES),
    seed: int | None = None,
    on_progress: OnProgress = _ignore,
) -> SimulationReport:
    """Live through a trace under each policy.

    Args:
        name: the trace's, for the report.
        trace: the trace.
        policies: names of `POLICIES`.
        seed: instead of the trace's own.
        on_progress: told when a request has ended.

    Raises:
        NotFoundError: there is no such policy.
        BrokenInvariantError: a policy overcommitted the GPU, touched what is pinned, or lost a request.
    """
    unknown = [each for each in policies if each not in POLICIES]
    if unknown:
        raise NotFoundError(f"there is no policy {unknown[0]!r}; there are {', '.join(POLICIES)}")
    chosen_seed = trace.seed if seed is None else seed
    requests = draw_requests(trace, chosen_seed)
    found: list[PolicyReport] = []
    for policy in dict.fromkeys(policies):
        life = _Life(policy, trace, requests, on_progress)
        found.append(run_in_virtual_time(life.live()))
    return SimulationReport(
        trace=name,
        title=trace.title,
        seed=chosen_seed,
        requests=len(requests),
        policies=tuple(found),
    )


class _Life:
    """One trace under one policy."""

    def __init__(self, name: str, trace: Trace, requests: Sequence[Request], on_progress: OnProgress) -> None:
        self._name = name
        self._trace = trace
        self._requests = requests
        self._tell = on_progress
        self._outcomes: list[Outcome] = []

    async def live(self) -> PolicyReport:
        """Live through it."""
        loop = asyncio.get_running_loop()
        node = TraceNode(self._trace)
        policy = POLICIES[self._name](node)
        begun_s = loop.time()
        running = asyncio.create_task(policy.run())
        last_s = max((each.at_s for each in self._requests), default=0.0)
        try:
            async with asyncio.timeout(last_s + _LONGEST_S), asyncio.TaskGroup() as served:
                for request in self._requests:
                    await asyncio.sleep(begun_s + request.at_s - loop.time())
                    served.create_task(self._serve(node, policy, request))
        except* (TimeoutError, BrokenInvariantError):
            # What is missing is said below.
            pass
        duration_s = loop.time() - begun_s
        tasks = [running, *node.ongoing]
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        lost = len(self._requests) - len(self._outcomes)
        if node.broken:
            raise BrokenInvariantError(f"{self._name}: {node.broken[0]}")
        for each in ended:
            if isinstance(each, Exception):
                raise each
        if lost:
            raise BrokenInvariantError(f"{self._name}: {lost} requests never ended")
        return self._report(node, duration_s)

    async def _serve(self, node: TraceNode, policy: Policy, request: Request) -> None:
        loop = asyncio.get_running_loop()
        come_s = loop.time()
        engine = node.engines[request.deployment]
        visit, refusal = Visit(), ""
        wait_s = None
        try:
            async with policy.admit(request, visit):
                if request.checkpoint and await node.prepare(engine, request.checkpoint):
                    visit.swapped = True
                wait_s = loop.time() - come_s
                await node.serve(engine, request.checkpoint, request.service_s)
        except RungError as error:
            refusal = error.reason
        self._outcomes.append(
            Outcome(
                request=request,
                wait_s=loop.time() - come_s if wait_s is None else wait_s,
                swapped=visit.swapped,
                grade=visit.grade.value,
                refusal=refusal,
            )
        )
        self._tell(self._name, len(self._outcomes), len(self._requests))

    def _report(self, node: TraceNode, duration_s: float) -> PolicyReport:
        outcomes = self._outcomes
        kinds = dict.fromkeys(each.kind for each in self._requests)
        waits = summarise(outcomes)
        return PolicyReport(
            policy=self._name,
            waits=waits,
            kinds={
                kind: summarise([each for each in outcomes if each.request.kind == kind])
                for kind in sorted(kinds)
            },
            no_swap_share=waits.no_swap_share,
            swaps=node.swaps,
            grades=count_grades(outcomes),
            refusals=dict(Counter(each.refusal for each in outcomes if each.refusal)),
            busy_share=node.busy_s / max(duration_s, 1e-9),
            vram_share=node.vram_share(),
            peak_bytes=node.peak_bytes,
            duration_s=duration_s,
        )
