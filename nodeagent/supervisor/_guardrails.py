"""What may be done to a deployment as it is: whose it is, whether it is pinned, and what its engine can."""

from __future__ import annotations

from nodeagent.engines import FreeControl, ShrinkControl, SleepControl
from nodeagent.supervisor._lifecycle import EngineLifecycle
from nodeagent.supervisor._state import DeploymentState
from rung.errors import (
    FailedPreconditionError,
    InvalidRequestError,
    NotAwakeError,
    NotOursError,
    PinnedDeploymentError,
)
from rung.types import Residency, ResidencyClass

_AT_REST = frozenset({Residency.STOPPED, Residency.FAILED})


class Guardrails:
    """Refuses what may not be done to one deployment; changes nothing.

    An answer holds until something is awaited: ask again when a turn has come.

    Args:
        state: of the deployment.
        lifecycle: of its engine.
    """

    def __init__(self, state: DeploymentState, lifecycle: EngineLifecycle) -> None:
        self._state = state
        self._lifecycle = lifecycle
        self._id = state.id

    @property
    def pinned(self) -> bool:
        """Whether the engine that runs, or the one that is configured, is pinned."""
        return self._state.record.residency_class is ResidencyClass.PINNED

    def require_stoppable(self, *, force: bool) -> None:
        """Raises NotOursError, or PinnedDeploymentError if it runs and `force` is not set."""
        self.require_ours("stop it where it was started")
        if self._state.record.running is not None:
            self.require_unpinned(force=force)

    def require_ours(self, instead: str) -> None:
        """Raises NotOursError, with what to do instead."""
        if self._lifecycle.external:
            raise NotOursError(f"{self._id} is run by somebody else; {instead}", deployment=self._id)

    def require_awake(self) -> None:
        """Raises NotAwakeError."""
        if self._state.residency is not Residency.AWAKE:
            raise self.not_awake()

    def not_awake(self) -> NotAwakeError:
        """What to raise when it would have to be awake."""
        # The detail of one that is simply stopped says no more than its residency.
        detail = self._state.deployment.detail
        more = f": {detail}" if detail and detail != self._state.residency else ""
        return NotAwakeError(f"{self._id} is {self._state.residency}{more}", deployment=self._id)

    def require_unpinned(self, *, force: bool) -> None:
        """Raises PinnedDeploymentError if `force` is not set."""
        if self.pinned and not force:
            raise PinnedDeploymentError(
                f"{self._id} is pinned; nothing is done to it without force", deployment=self._id
            )

    def require_level(self, level: int) -> None:
        """That it sleeps at this level. Raises FailedPreconditionError."""
        record = self._state.record
        if record.shrunk or record.sleep_level != level:
            found = "is shrunk" if record.shrunk else f"sleeps at level {record.sleep_level}"
            raise FailedPreconditionError(
                f"{self._id} {found}, from which there is no way to level {level}; wake it first, or stop it",
                deployment=self._id,
            )

    def require_sleepable(self, level: int, *, force: bool) -> SleepControl:
        """What puts it to sleep at this level.

        Raises:
            NotOursError: somebody else runs it.
            PinnedDeploymentError: it is pinned, and `force` is not set.
            FailedPreconditionError: its engine cannot sleep.
            InvalidRequestError: its engine knows no such level.
        """
        self.require_ours("put it to sleep where it was started")
        self.require_unpinned(force=force)
        control = self.sleep_control()
        levels = self._require_levels(control)
        if level not in levels:
            known = " or ".join(map(str, levels))
            raise InvalidRequestError(f"{self._id} sleeps at level {known}, not {level}", deployment=self._id)
        return control

    def _require_levels(self, control: SleepControl) -> tuple[int, ...]:
        levels = control.sleep_levels(self._state.record.spec)
        if not levels:
            raise FailedPreconditionError(
                f"{self._id} was not started so that it can sleep; stop it instead", deployment=self._id
            )
        return levels

    def require_shrinkable(self) -> ShrinkControl:
        """What shrinks it.

        Raises:
            NotOursError: somebody else runs it.
            PinnedDeploymentError, FailedPreconditionError: it may not be shrunk, or cannot.
        """
        self.require_ours("shrink it where it was started")
        if not self._state.record.spec.shrinkable:
            self.require_unpinned(force=False)
            raise FailedPreconditionError(
                f"{self._id} has not opted in to being shrunk (shrinkable)", deployment=self._id
            )
        adapter = self._lifecycle.adapter
        if not isinstance(adapter, ShrinkControl):
            raise FailedPreconditionError(f"the engine of {self._id} cannot shrink", deployment=self._id)
        self._require_levels(adapter)
        return adapter

    def sleep_control(self) -> SleepControl:
        """What puts it to sleep and wakes it. Raises FailedPreconditionError if it cannot sleep."""
        if not isinstance(self._lifecycle.adapter, SleepControl):
            raise FailedPreconditionError(
                f"the engine of {self._id} cannot sleep; stop it instead", deployment=self._id
            )
        return self._lifecycle.adapter

    def require_freeable(self) -> FreeControl:
        """What frees its cache. Raises PinnedDeploymentError, or FailedPreconditionError if it keeps none."""
        self.require_unpinned(force=False)
        if not isinstance(self._lifecycle.adapter, FreeControl):
            raise FailedPreconditionError(
                f"the engine of {self._id} keeps no cache that it could give back", deployment=self._id
            )
        return self._lifecycle.adapter

    def require_at_rest(self) -> None:
        """That nothing of ours runs, or is on its way. Raises FailedPreconditionError."""
        if not self._lifecycle.external and self._state.residency not in _AT_REST:
            raise FailedPreconditionError(
                f"{self._id} is {self._state.residency}; stop it first", deployment=self._id
            )
