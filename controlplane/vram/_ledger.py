"""The VRAM ledger of one memory pool: what is there, who holds it, and what has been promised.

A pool is one GPU, or the one memory of a machine whose GPU has none of its own (`unified`). Everything
here is a value of a moment: bytes are measured where a measurement exists, and nothing is looked up.
All sizes are in bytes, all durations in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import Struct

from rung.types import (
    Deployment,
    ExternalRuntime,
    LlamaCppEngine,
    OllamaEngine,
    Residency,
    ResidencyClass,
    VllmEngine,
)

GIB = 1 << 30

#: What a sleeping vLLM is taken to hold until it was measured: CUDA context, graphs and non-pool memory
#: stay. Public reports have 1.1 GiB on a 24 GiB card and plan for 0.5 to 3 GiB.
HELD_ASLEEP_ESTIMATE_BYTES = 3 * GIB // 2


class Reserve(Struct, frozen=True, kw_only=True):
    """What is never granted.

    Attributes:
        vram_bytes: of each GPU: what a driver, a desktop and measuring a second late may take.
        host_bytes: host RAM that sleepers never get.
    """

    vram_bytes: int = GIB
    host_bytes: int = 4 * GIB


class Timings(Struct, frozen=True, kw_only=True):
    """How long each action takes, and how long it takes to undo it.

    The defaults are those of a 14B model on the reference workstation: asleep in 2 s, awake again in 5 to
    10 s, cold in 30 to 60 s. What an agent has learnt of a deployment stands in their place.

    Attributes:
        sleep_s: sleep at level 1, weights to host RAM. Undone in `wake_s`.
        discard_s: sleep at level 2, weights dropped. Undone in `reload_s`.
        stop_s: stop the engine. Undone in `start_s`.
        free_s: flush the cache. Undone in `refill_s`.
        shrink_s: shrink to the weights. Undone in `grow_s`.
    """

    sleep_s: float = 2.0
    wake_s: float = 7.5
    discard_s: float = 1.0
    reload_s: float = 15.0
    stop_s: float = 5.0
    start_s: float = 45.0
    free_s: float = 2.0
    refill_s: float = 8.0
    shrink_s: float = 3.0
    grow_s: float = 10.0


class LedgerEntry(Struct, frozen=True, kw_only=True):
    """What one deployment holds of the pool, and what is known about making it give way.

    Attributes:
        resident_bytes: held in the pool now; asleep, what it still holds.
        measured: whether `resident_bytes` was measured (else declared or estimated).
        held_asleep_bytes: what it would hold in the pool while asleep, at either level.
        host_asleep_bytes: host RAM that sleeping at level 1 takes.
        sleep_levels: levels at which its engine can sleep: 1 keeps the weights in host RAM, 2 drops them.
        asleep_level: the level at which it sleeps now; 0 if it does not, or nobody knows.
        shrinkable: opted in to being shrunk, the only thing that may ever happen to a pinned one.
        shrunk_bytes: held once shrunk.
        shrunk: it sleeps, falls asleep or wakes, and only its KV cache is given up.
        cache_bytes: what a flush of its cache frees.
        active_requests: requests in flight; more than 0 means busy, to be drained before anything else.
        drain_expected_s: how long until those are done.
        idle_s: time since it was last used; 0 while busy.
        reuse_chance: chance, 0 to 1, that it is wanted again soon when it has just been used.
        leased: part of a lease that is held: untouchable until that ends.
        in_flux: a transition is under way or was ordered: untouchable until it is over.
        external: somebody else runs it: never slept, stopped or shrunk by us; its cache may be flushed.
    """

    deployment_id: str
    residency: Residency
    residency_class: ResidencyClass
    resident_bytes: int = 0
    measured: bool = False
    held_asleep_bytes: int = 0
    host_asleep_bytes: int = 0
    sleep_levels: tuple[int, ...] = ()
    asleep_level: int = 0
    shrinkable: bool = False
    shrunk_bytes: int = 0
    shrunk: bool = False
    cache_bytes: int = 0
    active_requests: int = 0
    drain_expected_s: float = 0.0
    idle_s: float = 0.0
    reuse_chance: float = 0.5
    timings: Timings = Timings()
    leased: bool = False
    in_flux: bool = False
    external: bool = False

    @property
    def busy(self) -> bool:
        """Whether requests are in flight."""
        return self.active_requests > 0

    @property
    def wake_expected_s(self) -> float:
        """How long it takes to wake it from where it sleeps."""
        if self.shrunk:
            return self.timings.grow_s
        return self.timings.reload_s if self.asleep_level == 2 else self.timings.wake_s

    @property
    def touchable(self) -> bool:
        """Whether it has settled and no lease holds it, so that something may be planned for it."""
        # By identity: a hash of an enum's member costs more than the whole rest.
        residency = self.residency
        return not (self.leased or self.in_flux) and (
            residency is Residency.AWAKE
            or residency is Residency.ASLEEP
            or residency is Residency.STOPPED
            or residency is Residency.FAILED
        )


class Reservation(Struct, frozen=True, kw_only=True):
    """Memory promised to a holder, of which some may have been taken already.

    Attributes:
        holder: one line for a person about who holds it.
        promised_bytes: what was promised.
        taken_bytes: what of it the pool's free figure no longer shows.
        deployment_id: the deployment that took it, if one did; its entry then holds those bytes.
    """

    holder: str
    promised_bytes: int
    taken_bytes: int = 0
    deployment_id: str = ""

    @property
    def outstanding_bytes(self) -> int:
        """Promised, not yet taken: still shown as free, and not to be promised again."""
        return max(0, self.promised_bytes - self.taken_bytes)

    @property
    def returned_bytes(self) -> int:
        """What its end gives back by itself; what a deployment took stays with the deployment."""
        return self.outstanding_bytes if self.deployment_id else max(self.promised_bytes, self.taken_bytes)


class Ledger(Struct, frozen=True, kw_only=True):
    """One memory pool at one moment.

    Attributes:
        pool_id: `node/index`, as in `workstation/0`.
        total_bytes: what the pool has.
        free_bytes: measured free.
        reserve_bytes: never granted to anybody.
        unattributed_bytes: in use, by nobody that we know: a desktop, a game, another user.
        unified: the pool is the host's memory too, so that sleeping to host RAM frees nothing.
        host_free_bytes: host RAM that is available; means nothing for a unified pool.
        host_reserve_bytes: host RAM that sleepers never get.
        entries: what deployments hold.
        reservations: what was promised.
    """

    pool_id: str
    total_bytes: int
    free_bytes: int
    reserve_bytes: int = 0
    unattributed_bytes: int = 0
    unified: bool = False
    host_free_bytes: int = 0
    host_reserve_bytes: int = 0
    entries: tuple[LedgerEntry, ...] = ()
    reservations: tuple[Reservation, ...] = ()

    @property
    def promised_bytes(self) -> int:
        """Bytes that show as free and are somebody's already."""
        return sum(each.outstanding_bytes for each in self.reservations)

    @property
    def available_bytes(self) -> int:
        """Bytes that can be granted now; negative when reserve and promises exceed what is free."""
        return self.free_bytes - self.reserve_bytes - self.promised_bytes

    @property
    def host_budget_bytes(self) -> int:
        """Host RAM that further sleepers may take."""
        return max(0, self.host_free_bytes - self.host_reserve_bytes)

    def entry(self, deployment_id: str) -> LedgerEntry | None:
        """The entry of a deployment, or None."""
        return next((each for each in self.entries if each.deployment_id == deployment_id), None)


class Facts(Struct, frozen=True, kw_only=True):
    """What is known of a deployment beyond the fleet's snapshot; None where nobody has measured.

    Attributes:
        measured_bytes: held now, if the platform tells; None falls back on the snapshot's own figure.
        estimated_bytes: what it would hold awake by the footprint model.
        weights_bytes: its weights: what level 1 takes of host RAM, and what is left when shrunk.
        held_asleep_bytes: held while asleep, as measured the last time.
        The others are those of `LedgerEntry`; `sleep_levels` None means what its engine says it can.
    """

    measured_bytes: int | None = None
    estimated_bytes: int = 0
    weights_bytes: int | None = None
    held_asleep_bytes: int | None = None
    host_asleep_bytes: int | None = None
    shrunk_bytes: int | None = None
    cache_bytes: int = 0
    sleep_levels: tuple[int, ...] | None = None
    asleep_level: int = 0
    drain_expected_s: float = 0.0
    idle_s: float = 0.0
    reuse_chance: float = 0.5
    timings: Timings = Timings()
    leased: bool = False
    in_flux: bool = False


def build_entry(deployment: Deployment, facts: Facts) -> LedgerEntry:
    """The entry of a deployment: a measured figure before the declared one, that before the estimate.

    One whose engine is down holds nothing unless a measurement says otherwise. Where nothing was measured
    of a sleeper, it is taken to hold `HELD_ASLEEP_ESTIMATE_BYTES` (never more than it holds awake), and
    level 1 to need as much host RAM as it gives up in the pool.
    """
    spec = deployment.spec
    declared_bytes = spec.vram_bytes or facts.estimated_bytes
    measured_bytes = deployment.vram_bytes if facts.measured_bytes is None else facts.measured_bytes
    known_awake_bytes = (
        measured_bytes if measured_bytes and deployment.residency is Residency.AWAKE else declared_bytes
    )
    held_asleep_bytes = facts.held_asleep_bytes
    if held_asleep_bytes is None:
        held_asleep_bytes = min(HELD_ASLEEP_ESTIMATE_BYTES, known_awake_bytes)
    if measured_bytes is not None:
        resident_bytes = measured_bytes
    elif deployment.residency in (Residency.STOPPED, Residency.FAILED):
        resident_bytes = 0
    elif deployment.residency is Residency.ASLEEP and not deployment.shrunk:
        resident_bytes = held_asleep_bytes
    else:
        resident_bytes = declared_bytes
        if deployment.residency is Residency.ASLEEP:
            resident_bytes -= deployment.kv_cache_bytes or 0
    host_asleep_bytes = facts.host_asleep_bytes
    if host_asleep_bytes is None:
        given_up_bytes = max(0, known_awake_bytes - held_asleep_bytes)
        host_asleep_bytes = given_up_bytes if facts.weights_bytes is None else facts.weights_bytes
    shrunk_bytes = facts.shrunk_bytes
    if shrunk_bytes is None:
        shrunk_bytes = _shrunk_bytes(deployment, resident_bytes, facts.weights_bytes)
    return LedgerEntry(
        deployment_id=spec.id,
        residency=deployment.residency,
        residency_class=spec.residency_class,
        resident_bytes=resident_bytes,
        measured=measured_bytes is not None,
        held_asleep_bytes=held_asleep_bytes,
        host_asleep_bytes=host_asleep_bytes,
        sleep_levels=_sleep_levels(deployment) if facts.sleep_levels is None else facts.sleep_levels,
        asleep_level=facts.asleep_level if deployment.residency is Residency.ASLEEP else 0,
        shrinkable=spec.shrinkable,
        shrunk_bytes=shrunk_bytes,
        shrunk=deployment.shrunk,
        cache_bytes=min(facts.cache_bytes, resident_bytes),
        active_requests=deployment.active_requests,
        drain_expected_s=facts.drain_expected_s,
        idle_s=0.0 if deployment.active_requests else facts.idle_s,
        reuse_chance=facts.reuse_chance,
        timings=facts.timings,
        leased=facts.leased,
        in_flux=facts.in_flux,
        external=isinstance(spec.engine.runtime, ExternalRuntime),
    )


def build_ledger(
    *,
    pool_id: str,
    total_bytes: int,
    free_bytes: int,
    deployments: Iterable[tuple[Deployment, Facts]],
    reserve_bytes: int = 0,
    unified: bool = False,
    host_free_bytes: int = 0,
    host_reserve_bytes: int = 0,
    reservations: tuple[Reservation, ...] = (),
) -> Ledger:
    """The ledger of a pool, from its measured totals and what is known of the deployments on it.

    What is in use and belongs to no deployment is `unattributed`, never below 0. Figures that were not
    measured (WSL2 tells no process's share) cannot add up to more than is in use: if they do, they are
    scaled down together, since a plan that counts on bytes that nobody holds would fall short.
    Entries are in the order of their ids, so that equal pools make equal ledgers.
    """
    entries = sorted(
        (build_entry(deployment, facts) for deployment, facts in deployments),
        key=lambda entry: entry.deployment_id,
    )
    used_bytes = max(0, total_bytes - free_bytes)
    measured_bytes = sum(entry.resident_bytes for entry in entries if entry.measured)
    assumed_bytes = sum(entry.resident_bytes for entry in entries if not entry.measured)
    room_bytes = max(0, used_bytes - measured_bytes)
    if assumed_bytes > room_bytes:
        entries = [
            entry if entry.measured else _scaled(entry, room_bytes, assumed_bytes) for entry in entries
        ]
    attributed_bytes = sum(entry.resident_bytes for entry in entries)
    return Ledger(
        pool_id=pool_id,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        reserve_bytes=reserve_bytes,
        unattributed_bytes=max(0, used_bytes - attributed_bytes),
        unified=unified,
        host_free_bytes=host_free_bytes,
        host_reserve_bytes=host_reserve_bytes,
        entries=tuple(entries),
        reservations=reservations,
    )


def _scaled(entry: LedgerEntry, room_bytes: int, assumed_bytes: int) -> LedgerEntry:
    resident_bytes = entry.resident_bytes * room_bytes // assumed_bytes
    return msgspec.structs.replace(
        entry, resident_bytes=resident_bytes, cache_bytes=min(entry.cache_bytes, resident_bytes)
    )


def _shrunk_bytes(deployment: Deployment, resident_bytes: int, weights_bytes: int | None) -> int:
    """What it holds once its KV cache is given up; all that it holds if nobody knows how large that is."""
    if deployment.residency is Residency.ASLEEP and deployment.shrunk:
        return resident_bytes
    engine = deployment.spec.engine.engine
    configured_bytes = engine.kv_cache_memory_bytes if isinstance(engine, VllmEngine) else 0
    kv_cache_bytes = deployment.kv_cache_bytes or configured_bytes
    if kv_cache_bytes:
        return max(0, resident_bytes - kv_cache_bytes)
    return resident_bytes if weights_bytes is None else weights_bytes


def _sleep_levels(deployment: Deployment) -> tuple[int, ...]:
    engine = deployment.spec.engine.engine
    if isinstance(engine, OllamaEngine) or (isinstance(engine, LlamaCppEngine) and engine.router_model):
        # Its server lets go of the model, and keeps nothing of it.
        return (2,)
    return (1, 2) if isinstance(engine, VllmEngine) and engine.sleep_mode else ()
