"""How long a step takes at a deployment, learnt from how long it took.

Pure. A step has a name (`load:flux`, `sampling:quality`) and a length in units (1 for a load, the number of
steps for a sampling). What is stated is the median of the last observations, and nothing where these differ
so much that a statement would be a guess.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from statistics import median

from msgspec import Struct

#: So many observations are kept of each step: enough for a median that one or two odd ones do not move, few
#: enough to follow a change of hardware or model within five.
KEPT_OBSERVATIONS = 9
_MOST_KEYS = 2000
#: Observations whose upper quartile is so many times the lower one are no ground for a statement.
_MOST_SPREAD = 3.0
#: Nothing that is waited for takes a day: a clock jumped, or a machine slept.
_LONGEST_S = 24 * 3600.0

Key = tuple[str, str]


class Observations(Struct, frozen=True, kw_only=True):
    """The last observations of one step, oldest first, as they are stored."""

    deployment_id: str
    step: str
    seconds_per_unit: tuple[float, ...]


class Estimate(Struct, frozen=True, kw_only=True):
    """What is known of a step.

    Attributes:
        seconds_per_unit: the median.
        spread: how many times the lower quartile the upper one is; 1 if all are the same.
        observations: how many it is from.
    """

    seconds_per_unit: float
    spread: float
    observations: int

    @property
    def is_sure(self) -> bool:
        """Whether it may be stated."""
        return self.spread <= _MOST_SPREAD


class Estimates:
    """Expected times of steps by deployment. Those that were not used for longest are forgotten first."""

    def __init__(self, *, most_keys: int = _MOST_KEYS) -> None:
        self._most_keys = most_keys
        self._seen: OrderedDict[Key, deque[float]] = OrderedDict()
        self._changed: set[Key] = set()

    def observe(self, deployment_id: str, step: str, seconds: float, units: float = 1.0) -> None:
        """Learn that so many units of a step took so many seconds; nonsense is ignored."""
        if not (0 < seconds <= _LONGEST_S and 0 < units < math.inf):
            return
        per_unit = seconds / units
        if not 0 < per_unit < math.inf:
            return
        key = (deployment_id, step)
        self._at(key).append(per_unit)
        self._changed.add(key)

    def expected_s(self, deployment_id: str, step: str, units: float = 1.0) -> float | None:
        """Seconds that so many units of a step take; None if that is not known, or varies too much."""
        found = self.estimate(deployment_id, step)
        return found.seconds_per_unit * units if found is not None and found.is_sure else None

    def estimate(self, deployment_id: str, step: str) -> Estimate | None:
        """What is known of a step; None if it was never observed."""
        key = (deployment_id, step)
        seen = self._seen.get(key)
        if not seen:
            return None
        self._seen.move_to_end(key)
        ordered = sorted(seen)
        quarter = len(ordered) // 4
        return Estimate(
            seconds_per_unit=median(ordered),
            spread=ordered[-1 - quarter] / ordered[quarter],
            observations=len(ordered),
        )

    def restore(self, stored: Iterable[Observations]) -> None:
        """Take over what was stored, least recently observed first.

        Nothing of it counts as changed, but for what there is no room for.
        """
        for each in stored:
            sane = [value for value in each.seconds_per_unit if 0 < value <= _LONGEST_S]
            if sane:
                self._at((each.deployment_id, each.step)).extend(sane)

    def take_changed(self) -> tuple[list[Observations], list[Key]]:
        """What has to be stored, and the keys that are to be forgotten; asked again, only what is new."""
        changed, self._changed = self._changed, set()
        kept = [
            Observations(deployment_id=key[0], step=key[1], seconds_per_unit=tuple(self._seen[key]))
            for key in sorted(changed & self._seen.keys())
        ]
        return kept, sorted(changed - self._seen.keys())

    def not_stored(self, keys: Iterable[Key]) -> None:
        """Have these taken once more: storing them failed."""
        self._changed.update(keys)

    def _at(self, key: Key) -> deque[float]:
        """The observations of a key, which is now the one that was used last."""
        seen = self._seen.setdefault(key, deque(maxlen=KEPT_OBSERVATIONS))
        self._seen.move_to_end(key)
        while len(self._seen) > self._most_keys:
            forgotten, _ = self._seen.popitem(last=False)
            self._changed.add(forgotten)
        return seen


def relative_error(predicted: float, actual: float) -> float:
    """How far a prediction was from what came, as a share of what came (0.1 for 10 %)."""
    return abs(predicted - actual) / actual
