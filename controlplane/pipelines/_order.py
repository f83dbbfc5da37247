"""The order in which the targets of one request are tried, also after one of them was gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from controlplane.ladder import Candidate


class TargetOrder(Iterator[Candidate]):
    """Targets to try, best first; those further on cost nothing until one before them has failed.

    Args:
        targets: them.
        is_ready: whether one would answer at once.
    """

    def __init__(self, targets: Iterator[Candidate], is_ready: Callable[[Candidate], bool]) -> None:
        self._targets = targets
        self._is_ready = is_ready
        self._gone: set[str] = set()
        self._waited_for: set[str] = set()

    def __next__(self) -> Candidate:
        return next(self._targets)

    def waits_for(self, gone: Candidate) -> bool:
        """Whether to wait now for a target that turned out to be gone.

        1. Once at most for each.
        2. Not while one that is ready is still to be tried: then it comes once more, after all of them.
        3. Else at once: those further on would have to be started as well, and it is the better one.
        """
        if gone.id in self._waited_for:
            return False
        self._gone.add(gone.id)
        others = list(self._targets)
        if any(self._is_ready(each) for each in others if each.id not in self._gone):
            self._targets = iter([*others, gone])
            return False
        self._targets = iter(others)
        self._waited_for.add(gone.id)
        return True
