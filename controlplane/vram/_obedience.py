"""Which deployments did not do as they were told, and what they are therefore not told again. Pure.

An action that was carried out is spent: if the deployment did not give way although it said so, the next plan
needs another action. It can be told again once it was used (`forgive`), or after the backoff. A deployment
that failed or did not answer is left alone altogether until then.
"""

from __future__ import annotations

import msgspec

from controlplane.vram._ledger import GIB, LedgerEntry
from controlplane.vram._plan import Demand
from rung.types import ReclaimAction, ReclaimStep

#: A step that freed less than this share of what it promised fell short.
_ENOUGH = 0.9


class Obedience:
    """What was carried out and what failed, with the time until which that counts."""

    def __init__(self, backoff_s: float) -> None:
        self._backoff_s = backoff_s
        self._spent: dict[tuple[str, ReclaimAction, int], float] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._short: dict[str, tuple[float, str]] = {}

    def carried_out(self, step: ReclaimStep, freed_bytes: int, now_s: float) -> None:
        """A step was carried out and freed so much."""
        until_s = now_s + self._backoff_s
        self._spent[step.deployment_id, step.action, step.level] = until_s
        if freed_bytes < _ENOUGH * step.expected_bytes:
            text = (
                f"{step.deployment_id} was told to {step.action} and gave back {freed_bytes / GIB:.1f} of "
                f"{step.expected_bytes / GIB:.1f} GiB"
            )
            self._short[step.deployment_id] = until_s, text

    def refused(self, step: ReclaimStep, reason: str, now_s: float) -> None:
        """A step failed. To shrink is no cause to leave a deployment alone: it may have to grow at once."""
        if step.action is not ReclaimAction.SHRINK:
            self.failed(step.deployment_id, reason, now_s)
            return
        until_s = now_s + self._backoff_s
        self._spent[step.deployment_id, step.action, step.level] = until_s
        self._short[step.deployment_id] = until_s, f"{step.deployment_id} was not shrunk: {reason}"

    def failed(self, deployment_id: str, reason: str, now_s: float) -> None:
        """A raise failed, or a step."""
        self._failed[deployment_id] = now_s + self._backoff_s, reason

    def forgive(self, deployment_id: str) -> None:
        """The deployment was raised or used: what it was told before says nothing about it now."""
        for key in [key for key in self._spent if key[0] == deployment_id]:
            del self._spent[key]
        self._failed.pop(deployment_id, None)
        self._short.pop(deployment_id, None)

    def failure(self, deployment_id: str, now_s: float) -> tuple[float, str] | None:
        """For how many seconds more a deployment is left alone, and why; None if it is not."""
        until_s, reason = self._failed.get(deployment_id, (now_s, ""))
        return (until_s - now_s, reason) if until_s > now_s else None

    def failures(self, now_s: float) -> set[str]:
        """Deployments that are left alone because something failed."""
        return {each for each in self._failed if self.failure(each, now_s)}

    def left_alone(self, now_s: float) -> tuple[str, ...]:
        """Deployments that must not be touched, by id."""
        found = self.failures(now_s)
        for (deployment_id, action, _), until_s in self._spent.items():
            if action is ReclaimAction.STOP and until_s > now_s:
                found.add(deployment_id)
        return tuple(sorted(found))

    def keep_away(self, demand: Demand, now_s: float) -> Demand:
        """The demand, which also touches none of those that are left alone."""
        left_alone = self.left_alone(now_s)
        if not left_alone:
            return demand
        return msgspec.structs.replace(demand, exclude=(*demand.exclude, *left_alone))

    def disappointments(self, now_s: float) -> tuple[str, ...]:
        """Who did not give way as promised, one line each."""
        short = [text for until_s, text in self._short.values() if until_s > now_s]
        failed = [
            f"{each} did not do as told and is left alone for {until_s - now_s:.0f} s: {reason}"
            for each, (until_s, reason) in self._failed.items()
            if until_s > now_s
        ]
        return (*short, *failed)

    def adjust(self, entry: LedgerEntry, now_s: float) -> LedgerEntry:
        """The entry without the actions that are spent."""
        spent = [
            (action, level)
            for (deployment_id, action, level), until_s in self._spent.items()
            if deployment_id == entry.deployment_id and until_s > now_s
        ]
        for action, level in spent:
            if action is ReclaimAction.SLEEP:
                levels = tuple(each for each in entry.sleep_levels if each != level)
                entry = msgspec.structs.replace(entry, sleep_levels=levels)
            elif action is ReclaimAction.FREE:
                entry = msgspec.structs.replace(entry, cache_bytes=0)
            elif action is ReclaimAction.SHRINK:
                entry = msgspec.structs.replace(entry, shrinkable=False)
        return entry
