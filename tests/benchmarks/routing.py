"""How long the choice of a target takes among a thousand, for the first one that a request tries.

- mixed: a chain of 1,000 targets; each is away, lacks a capability, failed lately, is full, or is free, in a
  share that the request has to get past;
- last: the same, and only the last one of the chain is free;
- alike: 1,000 deployments of one model, each with some of its slots taken;
- full: a chain of 1,000, all of them full;
- alike-full: 1,000 deployments of one model, all of them full.

Each is measured twice: `choose` alone, and the whole of `Router.route` and `Router.choose` for a chat request
that leaves the effort open, with a snapshot that was read before.

    python -m tests.benchmarks.routing [--count N] [--seed N]
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from controlplane.fleet import FleetView, build_view
from controlplane.ladder import Candidate, Circuits, RungSpec, build_ladder
from controlplane.pipelines import Slots
from controlplane.pipelines._router import Judged, Router
from controlplane.pipelines._wish import Wish
from rung.types import (
    Deployment,
    DeploymentSpec,
    EngineSpec,
    JobKind,
    LlamaCppEngine,
    Node,
    NodeState,
    Policy,
    ProcessRuntime,
    Residency,
)

TARGETS = 1000
SLOTS = 16
NODES = 20
TARGET_P50_US = 100.0
BODY = b'{"messages":[{"role":"user","content":"Why is the sky blue?"}],"tools":[{"type":"function"}]}'


class Family(Struct, frozen=True):
    """What the targets of a fleet are like.

    Attributes:
        name: for the table.
        is_one_model: whether they are deployments of one model, and not entries of a chain.
        state: of a target, by its place.
    """

    name: str
    is_one_model: bool
    state: Callable[[random.Random, int], str]


def mixed(rng: random.Random, place: int) -> str:
    """One in five hundred is free."""
    return "free" if rng.random() < 0.002 else rng.choice(("away", "unable", "failed", "full", "full"))


def last(rng: random.Random, place: int) -> str:
    """Only the last is free."""
    return "free" if place == TARGETS - 1 else rng.choice(("away", "unable", "failed", "full", "full"))


FAMILIES = (
    Family("mixed", False, mixed),
    Family("last", False, last),
    Family("alike", True, lambda rng, place: "part"),
    Family("full", False, lambda rng, place: "full"),
    Family("alike-full", True, lambda rng, place: "full"),
)


class Fleet:
    """A snapshot."""

    def __init__(self, view: FleetView) -> None:
        self.view = view


class NoCloud:
    """No cloud models."""

    candidates: Mapping[str, Candidate] = {}

    def refusal(self, target_id: str) -> str:
        """Nothing is refused."""
        return ""


def spec(place: int, *, model: str, able: bool) -> DeploymentSpec:
    """One target."""
    return DeploymentSpec(
        id=f"target-{place:04}",
        node_id=f"node-{place % NODES}",
        model=model,
        slots=SLOTS,
        capabilities=("chat", "tools") if able else ("chat",),
        engine=EngineSpec(
            engine=LlamaCppEngine(model_path="/m.gguf"), runtime=ProcessRuntime(executable="engine")
        ),
    )


def router(rng: random.Random, family: Family) -> Router:
    """A router over a thousand targets in the states of a family."""
    nodes = {
        f"node-{place}": Node(id=f"node-{place}", address="x", state=NodeState.READY, last_seen_time_s=1.0)
        for place in range(NODES)
    }
    slots = Slots()
    circuits = Circuits(jitter=lambda: 1.0)
    specs: list[DeploymentSpec] = []
    reported: dict[str, dict[str, Deployment]] = {name: {} for name in nodes}
    for place in range(TARGETS):
        state = family.state(rng, place)
        found = spec(place, model="one" if family.is_one_model else f"m-{place}", able=state != "unable")
        specs.append(found)
        residency = Residency.UNKNOWN if state == "away" else Residency.AWAKE
        reported[found.node_id][found.id] = Deployment(spec=found, residency=residency)
        taken = SLOTS if state == "full" else rng.randint(1, SLOTS - 1) if state == "part" else 0
        for _ in range(taken):
            slots.try_acquire(found.id, SLOTS)
        for _ in range(3 if state == "failed" else 0):
            circuits.failed(found.id, 0.0, "HTTP 503")
    names = ["one"] if family.is_one_model else [each.id for each in specs]
    return Router(
        fleet=Fleet(build_view(nodes, specs, reported, "")),
        slots=slots,
        circuits=circuits,
        ladder=build_ladder([RungSpec(name="all", chain="all")], {"all": names}),
        cloud=NoCloud(),
        classify=lambda body: Judged(3, "measured elsewhere"),
        now_s=lambda: 1.0,
    )


def measure(family: Family, count: int, rng: random.Random) -> tuple[list[float], list[float]]:
    """Times of the choice alone, and of the route with it, in µs."""
    found = router(rng, family)
    wish = Wish(kind=JobKind.CHAT, model="rung/auto", body=BODY, policy=Policy())
    route = found.route(wish)
    alone: list[float] = []
    whole: list[float] = []
    gc.collect()
    for _ in range(count):
        begun = time.thread_time()
        next(found.choose(route))
        ended = time.thread_time()
        next(found.choose(found.route(wish)))
        whole.append((time.thread_time() - ended) * 1e6)
        alone.append((ended - begun) * 1e6)
    return alone, whole


def percentiles(taken: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th."""
    ordered = sorted(taken)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=2000, help="choices of each family")
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    rng = random.Random(chosen.seed)
    print(f"choosing among {TARGETS:,} targets, {chosen.count} choices a family, in µs")
    print(f"{'family':<12} {'choose p50':>11} {'p99':>6} {'route+choose p50':>18} {'p99':>6}")
    worst = 0.0
    for family in FAMILIES:
        alone, whole = measure(family, chosen.count, rng)
        (alone_50, alone_99), (whole_50, whole_99) = percentiles(alone), percentiles(whole)
        print(f"{family.name:<12} {alone_50:11.1f} {alone_99:6.0f} {whole_50:18.1f} {whole_99:6.0f}")
        worst = max(worst, alone_50, whole_50)
    word = "met" if worst < TARGET_P50_US else "NOT met"
    print(f"{word}: greatest p50 {worst:.0f} µs (below {TARGET_P50_US:.0f})")


if __name__ == "__main__":
    main()
