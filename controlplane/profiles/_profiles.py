"""The profiles, which of them is current, and the switch that is under way.

The current profile is what was applied and verified, and is stored: it is never read off what runs.
Models that take turns do not change it. A control plane that was killed in a switch has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import structlog
from msgspec.structs import replace

from controlplane.fleet import Division, Fleet, utilization_of
from controlplane.profiles._carrying import carry_out, differing, residency_of
from controlplane.profiles._log import SwitchLog
from controlplane.profiles._plan import plan_return, plan_switch
from controlplane.profiles._standing import look
from controlplane.store import ProfileState
from controlplane.vram import Reserve
from rung import reason_of_error
from rung.errors import (
    AlreadyExistsError,
    DrainingError,
    EngineStartFailedError,
    FailedPreconditionError,
    InvalidRequestError,
    RungError,
    UnknownProfileError,
)
from rung.types import (
    FailureReason,
    Profile,
    ProfileDone,
    ProfileEntry,
    ProfileEvent,
    ProfileFailed,
    ProfileList,
    ProfilePayload,
    ProfilePlan,
    ProfileStep,
    Residency,
    ResidencyClass,
)

_log = structlog.get_logger("rung.profiles")

#: Switches whose events can be read again.
_KEPT_LOGS = 32
_NO_RESERVES: Mapping[str, Reserve] = MappingProxyType({})
#: Where a deployment is going: what is to come back if a switch fails meanwhile.
_SETTLED = {
    Residency.STARTING: Residency.AWAKE,
    Residency.WAKING: Residency.AWAKE,
    Residency.FALLING_ASLEEP: Residency.ASLEEP,
    Residency.STOPPING: Residency.STOPPED,
    Residency.FAILED: Residency.STOPPED,
}


class ProfileStore(Protocol):
    """Where it is remembered, as `controlplane.store.ProfileStates` does."""

    async def read(self) -> ProfileState:
        """What was written last."""
        ...

    async def write(self, state: ProfileState) -> None:
        """Replace it. Raises UnavailableError: it was not stored."""
        ...


class Profiles:
    """All profiles. One switch at a time, which goes on when those who follow it leave.

    Args:
        fleet: the fleet that is divided.
        store: remembers.
        profiles: as configured.
        reserves: by node, what is never granted, where that is not as usual.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        store: ProfileStore,
        profiles: Sequence[Profile],
        reserves: Mapping[str, Reserve] = _NO_RESERVES,
    ) -> None:
        self._fleet = fleet
        self._store = store
        self._reserves = reserves
        self._profiles = {profile.name: profile for profile in profiles}
        self._state = ProfileState()
        self._logs: dict[str, SwitchLog] = {}
        self._task: asyncio.Task[None] | None = None
        self._under_way: SwitchLog | None = None

    async def start(self) -> None:
        """Take up what was stored; before the fleet is dialled, so that nothing is started that is held."""
        state = await self._store.read()
        if not state.ended:
            # Nothing is known of how far it came; the same operation id begins it anew.
            assert state.target is not None
            state = ProfileState(
                detail=f"the switch to {state.target.name} was cut short when the control plane ended; "
                "whatever it had changed by then is as it left it"
            )
        current = state.current
        if current is not None and self._profiles.get(current.name) != current:
            state = replace(
                state, current=None, detail=f"{current.name} was applied, and has been configured anew since"
            )
        self._state = state
        if state.detail:
            _log.warning("no_current_profile", detail=state.detail)
        self._fleet.divide(_division(state.current))

    async def aclose(self) -> None:
        """Let go of the switch that is under way: it counts as cut short."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def listing(self) -> ProfileList:
        """The profiles by name, and which is current."""
        return ProfileList(
            profiles=tuple(profile for _, profile in sorted(self._profiles.items())),
            current=self._state.current.name if self._state.current is not None else "",
            switching_to=self._under_way.profile if self._under_way is not None else "",
            detail=self._state.detail,
        )

    async def switch(
        self, name: str, operation_id: str, *, dry_run: bool = False
    ) -> AsyncGenerator[ProfileEvent, None]:
        """Apply a profile, and follow that from its first event; a dry run ends with the plan.

        The same operation id joins the switch, or repeats its events.

        Raises:
            InvalidRequestError: no operation id.
            UnknownProfileError: no such profile.
            AlreadyExistsError: the id belongs to a switch to another profile.
            FailedPreconditionError: another switch is under way.
            ConfigError: the profile cannot fit its GPU.
            VramInfeasibleError: it does not fit now.
            NodeUnreachableError: a node that it needs does not answer.
            UnavailableError: the switch cannot be stored, and was not begun.
        """
        if not operation_id:
            raise InvalidRequestError("a switch needs an operation_id of the caller's choice")
        profile = self._profiles.get(name)
        if profile is None:
            known = ", ".join(sorted(self._profiles)) or "none"
            raise UnknownProfileError(f"there is no profile {name!r}; profiles are: {known}", profile=name)
        log = self._logs.get(operation_id)
        if log is None and not dry_run:
            repeated = self._repeated(operation_id, name)
            if repeated is not None:
                yield ProfileEvent(operation_id, 1, 0.0, repeated)
                return
        if log is None:
            if self._under_way is not None:
                raise FailedPreconditionError(
                    f"a switch to {self._under_way.profile} is under way; "
                    "`rung profile list` tells when it is over"
                )
            steps = self._plan(profile)
            if dry_run:
                yield ProfileEvent(operation_id, 1, 0.0, ProfilePlan(steps))
                return
            log = self._begin(profile, operation_id, steps)
        elif log.profile != name:
            raise _taken(operation_id, log.profile)
        async for event in log.events():
            yield event

    def _repeated(self, operation_id: str, name: str) -> ProfilePayload | None:
        """How a switch ended that an earlier control plane carried out; None if this is not it."""
        state = self._state
        if state.operation_id != operation_id or state.target is None:
            return None
        if state.target.name != name:
            raise _taken(operation_id, state.target.name)
        if state.current == state.target and not state.detail:
            return ProfileDone(name)
        current = state.current.name if state.current is not None else ""
        return ProfileFailed(FailureReason.INTERNAL, state.detail, current)

    def _plan(self, profile: Profile) -> tuple[ProfileStep, ...]:
        standings, pools = look(
            self._fleet, [entry.deployment_id for entry in profile.entries], self._reserves
        )
        return plan_switch(profile, standings, pools)

    def _begin(self, profile: Profile, operation_id: str, steps: tuple[ProfileStep, ...]) -> SwitchLog:
        log = self._logs[operation_id] = SwitchLog(operation_id, profile.name)
        for key in list(self._logs)[:-_KEPT_LOGS]:
            del self._logs[key]
        self._under_way = log
        self._task = asyncio.create_task(self._drive(log, profile, steps), name=f"profile-{profile.name}")
        return log

    async def _drive(self, log: SwitchLog, profile: Profile, steps: tuple[ProfileStep, ...]) -> None:
        before = self._state
        outcome: ProfilePayload | RungError
        try:
            await self._store.write(ProfileState(operation_id=log.operation_id, target=profile, ended=False))
            outcome = await self._carry_out(log, profile, steps, before)
        except asyncio.CancelledError:
            log.refuse(DrainingError("the control plane is shutting down; the switch is cut short"))
            raise
        except RungError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - readers must learn of the end of every switch
            _log.error("profile_defect", operation=log.operation_id, exc_info=error)
            detail = f"the switch to {profile.name} failed; the server's log has the details"
            await self._settle(log, profile, None, detail)
            outcome = ProfileFailed(FailureReason.INTERNAL, detail)
        finally:
            self._under_way = None
        if isinstance(outcome, RungError):
            log.refuse(outcome)
        else:
            log.add(outcome)

    async def _carry_out(
        self, log: SwitchLog, profile: Profile, steps: tuple[ProfileStep, ...], before: ProfileState
    ) -> ProfileDone | ProfileFailed:
        self._state = ProfileState(operation_id=log.operation_id, target=profile, ended=False)
        as_it_was = self._as_it_is(steps)
        was_divided = self._fleet.division
        self._fleet.divide(_under_way(profile, steps))
        log.add(ProfilePlan(steps))
        doing = ""
        try:
            for step in steps:
                doing = f"{step.deployment_id} to {step.residency}: "
                await carry_out(self._fleet, step, log.add)
            doing = ""
            wrong = differing(self._fleet, profile.entries)
            if wrong:
                told = "; ".join(f"{name} is {how}" for name, how in wrong.items())
                raise EngineStartFailedError(f"all steps were taken, and {told}")
        except RungError as error:
            _log.warning("profile_switch_failed", profile=profile.name, detail=error.message)
            not_back = await self._go_back(log, as_it_was, was_divided)
            current = None if not_back else before.current
            back = _back_words(not_back, before.current)
            detail = f"the switch to {profile.name} failed: {doing}{error.message}; {back}"
            await self._settle(log, profile, current, detail)
            return ProfileFailed(reason_of_error(error), detail, current.name if current is not None else "")
        await self._settle(log, profile, profile, "")
        _log.info("profile_switched", profile=profile.name, steps=len(steps))
        return ProfileDone(profile.name)

    def _as_it_is(self, steps: Sequence[ProfileStep]) -> list[ProfileEntry]:
        """How those that are to be changed are now, as a profile would want them."""
        entries = []
        for deployment_id in dict.fromkeys(step.deployment_id for step in steps):
            spec = self._fleet.view.deployments[deployment_id].deployment.spec
            if spec.residency_class is ResidencyClass.PINNED:
                # One that has come up stays up.
                continue
            residency = residency_of(self._fleet, deployment_id)
            residency = _SETTLED.get(residency, residency)
            entries.append(ProfileEntry(deployment_id, residency, utilization_of(spec)))
        return entries

    async def _go_back(
        self, log: SwitchLog, as_it_was: Sequence[ProfileEntry], was_divided: Division
    ) -> dict[str, str]:
        """Undo what was changed, as far as that works; returns what is not back, each with the reason."""
        not_back: dict[str, str] = {}
        known, _ = look(self._fleet, [], self._reserves)
        steps = plan_return(as_it_was, known)
        shares = {
            each.deployment_id: each.gpu_memory_utilization
            for each in as_it_was
            if each.gpu_memory_utilization
        }
        going_back = Profile(name="what was before", entries=tuple(as_it_was))
        division = _under_way(going_back, steps)
        self._fleet.divide(replace(division, utilizations={**was_divided.utilizations, **shares}))
        if steps:
            log.add(ProfilePlan(steps, going_back=True))
        for step in steps:
            if step.deployment_id in not_back:
                continue
            try:
                await carry_out(self._fleet, step, log.add)
            except RungError as error:
                not_back[step.deployment_id] = error.message
        return differing(self._fleet, as_it_was) | not_back

    async def _settle(self, log: SwitchLog, target: Profile, current: Profile | None, detail: str) -> None:
        """The switch is over: remember how, and let that division hold."""
        state = ProfileState(current=current, operation_id=log.operation_id, target=target, detail=detail)
        self._state = state
        self._fleet.divide(_division(current))
        try:
            await self._store.write(state)
        except RungError as error:
            # It holds as long as this process lives; after that it counts as cut short.
            _log.error("profile_not_stored", profile=target.name, error=error.message)


def _division(current: Profile | None) -> Division:
    """What the current profile asks of the fleet."""
    if current is None:
        return Division()
    down = _down(current)
    words = f"profile {current.name} holds it %s; `rung profile switch` to another lets it come up"
    return Division(
        profile=current.name,
        holds={name: words % residency for name, residency in down.items()} if current.hold else {},
        down=frozenset(down),
        utilizations=_utilizations(current),
    )


def _under_way(profile: Profile, steps: Sequence[ProfileStep]) -> Division:
    """What holds during a switch: nobody wakes what it takes down, but for the switch itself."""
    down = _down(profile)
    for step in steps:
        if step.residency is not Residency.AWAKE:
            down.setdefault(step.deployment_id, step.residency)
    raised = {step.deployment_id for step in steps if step.residency is Residency.AWAKE}
    return Division(
        holds={
            name: f"a switch to {profile.name} is under way, which wants it {residency}"
            for name, residency in down.items()
            if name not in raised
        },
        down=frozenset(down),
        utilizations=_utilizations(profile),
    )


def _down(profile: Profile) -> dict[str, Residency]:
    return {
        entry.deployment_id: entry.residency
        for entry in profile.entries
        if entry.residency is not Residency.AWAKE
    }


def _utilizations(profile: Profile) -> dict[str, float]:
    return {
        entry.deployment_id: entry.gpu_memory_utilization
        for entry in profile.entries
        if entry.gpu_memory_utilization
    }


def _back_words(not_back: dict[str, str], before: Profile | None) -> str:
    if not_back:
        told = "; ".join(f"{name} ({why})" for name, why in not_back.items())
        return f"not everything is back as it was: {told}"
    return f"{before.name} is back" if before is not None else "everything is back as it was before"


def _taken(operation_id: str, name: str) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"operation {operation_id} is already a switch to {name}; choose another id", operation=operation_id
    )
