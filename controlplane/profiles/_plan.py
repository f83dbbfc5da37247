"""From how things are to how a profile wants them: the steps, in their order. Pure.

Memory is freed before it is taken:

1. What is to be down, or to start anew with another share of the GPU, is put to sleep or stopped.
2. If that does not free enough, what the profile does not name gives way: sleepers sleep, others stop.
3. What is to be asleep and is not even started is started, and put to sleep.
4. What is to be awake is started or woken.

A pinned deployment is never put to sleep, stopped or started anew; one that is down may come up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from controlplane.vram import ProfileShare, Timings, check_profile, reserved_bytes
from rung.errors import VramInfeasibleError
from rung.types import Profile, ProfileEntry, ProfileStep, Residency, ResidencyClass

_GIB = 1 << 30
_DOWN = frozenset({Residency.STOPPED, Residency.FAILED})
_SLEEPING = frozenset({Residency.ASLEEP, Residency.WAKING})
#: What can be put to sleep as it is.
_ON_ITS_FEET = frozenset({Residency.AWAKE, Residency.WAKING, Residency.FALLING_ASLEEP})
#: Shares are told with two decimals; what differs by less is the same.
_SAME_SHARE = 1e-6


class Standing(Struct, frozen=True, kw_only=True):
    """A deployment as it is, and what it would hold of its pool otherwise.

    Attributes:
        pool_id: its GPU; empty if it is on none.
        configured_utilization: the share of the GPU that is its own; 0 if it has none.
        running_utilization: the share with which its engine runs; 0 if it does not run, or has none.
        resident_bytes: what it holds now.
        awake_bytes: what it holds awake with its own share; 0 if nobody knows.
        asleep_bytes: what it holds asleep.
        can_sleep: whether its engine can.
        external: somebody else runs it.
    """

    deployment_id: str
    residency: Residency
    residency_class: ResidencyClass
    pool_id: str = ""
    configured_utilization: float = 0.0
    running_utilization: float = 0.0
    resident_bytes: int = 0
    awake_bytes: int = 0
    asleep_bytes: int = 0
    can_sleep: bool = False
    external: bool = False
    timings: Timings = Timings()

    @property
    def pinned(self) -> bool:
        """Whether it is never to be touched."""
        return self.residency_class is ResidencyClass.PINNED

    @property
    def runs(self) -> bool:
        """Whether its engine runs."""
        return self.residency not in _DOWN


class Pool(Struct, frozen=True, kw_only=True):
    """A GPU: all of it, what is kept free, and what could be granted now."""

    total_bytes: int
    reserve_bytes: int
    available_bytes: int


class _Steps(Struct):
    """Steps by when they come."""

    down: list[ProfileStep] = []
    through: list[ProfileStep] = []
    up: list[ProfileStep] = []


def plan_switch(
    profile: Profile, standings: Mapping[str, Standing], pools: Mapping[str, Pool]
) -> tuple[ProfileStep, ...]:
    """The steps of a switch; none if everything is as the profile wants it.

    Args:
        profile: what is wanted; each deployment that it names is in `standings`.
        standings: deployments as they are, by id; in their order others give way.
        pools: their GPUs.

    Raises:
        ConfigError: the profile cannot fit a GPU; the message shows the sum.
        VramInfeasibleError: it does not fit now, whatever gives way.
    """
    _check_sums(profile, standings, pools)
    steps = _wanted_steps(profile.entries, standings)
    steps.down += _giving_way(profile, standings, pools)
    return (*steps.down, *steps.through, *steps.up)


def plan_return(before: Sequence[ProfileEntry], standings: Mapping[str, Standing]) -> tuple[ProfileStep, ...]:
    """The steps back to how things were, for those of them that are known still."""
    steps = _wanted_steps([entry for entry in before if entry.deployment_id in standings], standings)
    return (*steps.down, *steps.through, *steps.up)


def _wanted_steps(entries: Sequence[ProfileEntry], standings: Mapping[str, Standing]) -> _Steps:
    steps = _Steps()
    for entry in entries:
        standing = standings[entry.deployment_id]
        if standing.pinned or standing.external:
            if standing.residency is not Residency.AWAKE:
                steps.up.append(_raising(entry, standing))
            continue
        anew = _starts_anew(entry, standing)
        match entry.residency:
            case Residency.STOPPED:
                if standing.runs:
                    steps.down.append(_stopping(standing, "stop"))
            case Residency.ASLEEP:
                if standing.residency is Residency.ASLEEP and not anew:
                    continue
                if standing.residency in _ON_ITS_FEET and not anew:
                    steps.down.append(_sleeping(standing))
                    continue
                if anew:
                    steps.down.append(_stopping(standing, _anew_words(entry, standing)))
                steps.through += [_raising(entry, standing, "start, to be put to sleep"), _sleeping(standing)]
            case _:
                if anew:
                    steps.down.append(_stopping(standing, _anew_words(entry, standing)))
                if anew or standing.residency is not Residency.AWAKE:
                    steps.up.append(_raising(entry, standing))
    return steps


def _giving_way(
    profile: Profile, standings: Mapping[str, Standing], pools: Mapping[str, Pool]
) -> list[ProfileStep]:
    """Steps of those that the profile does not name, as far as their memory is needed."""
    entries = {entry.deployment_id: entry for entry in profile.entries}
    steps: list[ProfileStep] = []
    for pool_id, pool in pools.items():
        there = [each for each in standings.values() if each.pool_id == pool_id]
        missing_bytes = _missing_bytes(pool, there, entries)
        for standing in there:
            if missing_bytes <= 0:
                break
            if not _may_give_way(standing, entries):
                continue
            sleeps = standing.can_sleep and standing.residency_class is ResidencyClass.SLEEPABLE
            if sleeps and standing.residency is Residency.ASLEEP:
                continue
            words = "not in the profile, and its memory is needed"
            steps.append(_sleeping(standing, words) if sleeps else _stopping(standing, f"stop: {words}"))
            missing_bytes -= standing.resident_bytes - (standing.asleep_bytes if sleeps else 0)
        flushed_bytes = sum(
            each.resident_bytes for each in there if each.residency_class is ResidencyClass.CACHE
        )
        if missing_bytes > flushed_bytes:
            raise VramInfeasibleError(
                f"profile {profile.name} does not fit {pool_id} now: {missing_bytes / _GIB:.1f} GiB are held "
                "by what may not be touched, or by what is no deployment",
                missing_bytes=str(missing_bytes),
            )
    return steps


def _may_give_way(standing: Standing, entries: Mapping[str, ProfileEntry]) -> bool:
    return (
        standing.deployment_id not in entries
        and standing.runs
        and not (standing.pinned or standing.external)
        and standing.residency_class is not ResidencyClass.CACHE
    )


def _missing_bytes(pool: Pool, there: Sequence[Standing], entries: Mapping[str, ProfileEntry]) -> int:
    """What is missing at the tightest moment of the switch, if nothing else gives way."""
    free_bytes = pool.available_bytes
    through: list[tuple[int, int]] = []
    taken_bytes = 0
    for standing in there:
        entry = entries.get(standing.deployment_id)
        if entry is None:
            continue
        awake_bytes = _awake_bytes(entry, standing, pool)
        anew = _starts_anew(entry, standing) and not (standing.pinned or standing.external)
        if entry.residency is Residency.STOPPED or anew:
            free_bytes += standing.resident_bytes
        if entry.residency is Residency.AWAKE and anew:
            taken_bytes += awake_bytes
        elif entry.residency is Residency.AWAKE and standing.residency is not Residency.AWAKE:
            taken_bytes += max(0, awake_bytes - standing.resident_bytes)
        elif entry.residency is Residency.ASLEEP and (anew or not standing.runs):
            through.append((awake_bytes, standing.asleep_bytes))
        elif entry.residency is Residency.ASLEEP:
            free_bytes += max(0, standing.resident_bytes - standing.asleep_bytes)
    missing_bytes = 0
    for awake_bytes, asleep_bytes in through:
        missing_bytes = max(missing_bytes, awake_bytes - free_bytes)
        free_bytes -= asleep_bytes
    return max(missing_bytes, taken_bytes - free_bytes)


def _check_sums(profile: Profile, standings: Mapping[str, Standing], pools: Mapping[str, Pool]) -> None:
    entries = {entry.deployment_id: entry for entry in profile.entries}
    for pool_id, pool in pools.items():
        shares = []
        for standing in standings.values():
            entry = entries.get(standing.deployment_id)
            if standing.pool_id != pool_id or (entry is None and not standing.pinned):
                continue
            if entry is None:
                share = ProfileShare(deployment_id=standing.deployment_id, vram_bytes=standing.resident_bytes)
            elif entry.residency is Residency.AWAKE:
                utilization = entry.gpu_memory_utilization or standing.configured_utilization
                share = ProfileShare(
                    deployment_id=standing.deployment_id,
                    gpu_memory_utilization=utilization,
                    vram_bytes=standing.awake_bytes,
                )
            else:
                asleep = entry.residency is Residency.ASLEEP
                share = ProfileShare(
                    deployment_id=standing.deployment_id, vram_bytes=standing.asleep_bytes if asleep else 0
                )
            shares.append(share)
        check_profile(profile.name, shares, total_bytes=pool.total_bytes, reserve_bytes=pool.reserve_bytes)


def _awake_bytes(entry: ProfileEntry, standing: Standing, pool: Pool) -> int:
    if entry.gpu_memory_utilization:
        return reserved_bytes(entry.gpu_memory_utilization, pool.total_bytes)
    return standing.awake_bytes


def _starts_anew(entry: ProfileEntry, standing: Standing) -> bool:
    """Whether it runs with another share of the GPU than it is to have."""
    wanted = entry.gpu_memory_utilization or standing.configured_utilization
    running = standing.running_utilization
    return (
        entry.residency is not Residency.STOPPED
        and standing.runs
        and bool(wanted and running)
        and abs(wanted - running) > _SAME_SHARE
    )


def _anew_words(entry: ProfileEntry, standing: Standing) -> str:
    wanted = entry.gpu_memory_utilization or standing.configured_utilization
    return f"stop, to start with {wanted:.0%} of the GPU in place of {standing.running_utilization:.0%}"


def _stopping(standing: Standing, words: str) -> ProfileStep:
    freed = f" (frees {standing.resident_bytes / _GIB:.1f} GiB)" if standing.resident_bytes else ""
    return _step(standing, Residency.STOPPED, f"{words}{freed}", standing.timings.stop_s)


def _sleeping(standing: Standing, why: str = "") -> ProfileStep:
    freed_bytes = standing.resident_bytes - standing.asleep_bytes
    words = "put to sleep" + (f": {why}" if why else "")
    if freed_bytes > 0:
        words += f" (frees {freed_bytes / _GIB:.1f} GiB)"
    return _step(standing, Residency.ASLEEP, words, standing.timings.sleep_s)


def _raising(entry: ProfileEntry, standing: Standing, words: str = "") -> ProfileStep:
    timings = standing.timings
    if standing.residency in _SLEEPING and not _starts_anew(entry, standing):
        return _step(standing, Residency.AWAKE, words or "wake", timings.wake_s)
    wanted = entry.gpu_memory_utilization or standing.configured_utilization
    share = f" (with {wanted:.0%} of the GPU)" if wanted else ""
    return _step(standing, Residency.AWAKE, f"{words or 'start'}{share}", timings.start_s)


def _step(standing: Standing, residency: Residency, words: str, expected_s: float) -> ProfileStep:
    # What is known of durations is known of engines on a GPU.
    return ProfileStep(standing.deployment_id, residency, words, expected_s if standing.pool_id else None)
