"""Operations on engines: begun once for an id, followed by any number of readers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog

from nodeagent.supervisor._progress import Emit
from rung import reason_of_error
from rung.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidRequestError,
    RungError,
    UnavailableError,
)
from rung.service import Signal
from rung.types import (
    FailureReason,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecyclePayload,
)

_log = structlog.get_logger("rung.agent")

#: Operations that are remembered, so that a repeated id repeats the outcome.
REMEMBERED = 1000

Work = Callable[[Emit], Awaitable[LifecycleDone]]


class Operation:
    """One operation and all its events."""

    def __init__(self, operation_id: str, what: str) -> None:
        self.id = operation_id
        self.what = what
        self.task: asyncio.Task[None] | None = None
        self._began_s = asyncio.get_running_loop().time()
        self._events: list[LifecycleEvent] = []
        self._refusal: RungError | None = None
        self._ended = False
        self._changed = Signal()

    @property
    def ended(self) -> bool:
        """Whether no event follows."""
        return self._ended

    async def events(self) -> AsyncIterator[LifecycleEvent]:
        """From the first event to the last. A reader that leaves ends nothing.

        Raises:
            RungError: the operation was refused; it changed nothing.
        """
        place = 0
        while True:
            while place < len(self._events):
                yield self._events[place]
                place += 1
            if self._refusal is not None:
                raise self._refusal
            if self._ended:
                return
            await self._changed.wait()

    async def carry_out(self, work: Work, on_end: Callable[[], None]) -> None:
        """Do the work and note how it ended."""
        try:
            self._append(await work(self._append))
        except asyncio.CancelledError:
            self._append(LifecycleFailed(FailureReason.INTERNAL, "the operation was given up"))
            raise
        except (UnavailableError, DeadlineExceededError) as error:
            self._append(LifecycleFailed(reason_of_error(error), error.message))
        except RungError as error:
            self._refusal = error
        except Exception as error:  # noqa: BLE001 - the boundary: whatever it is becomes an event
            _log.error("operation_defect", operation=self.id, what=self.what, exc_info=error)
            self._append(
                LifecycleFailed(FailureReason.INTERNAL, "internal error; the agent's log has the details")
            )
        finally:
            self._ended = True
            on_end()
            self._changed.fire()

    def _append(self, payload: LifecyclePayload) -> None:
        elapsed_s = asyncio.get_running_loop().time() - self._began_s
        self._events.append(LifecycleEvent(self.id, len(self._events) + 1, elapsed_s, payload))
        self._changed.fire()


class Operations:
    """Operations by id. `on_end` is called at the end of each, before anybody hears of it."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._by_id: OrderedDict[str, Operation] = OrderedDict()

    def join_or_begin(self, operation_id: str, what: str, work: Work) -> Operation:
        """The operation of this id, begun if it is new.

        Raises:
            InvalidRequestError: no id.
            AlreadyExistsError: the id belongs to an operation of another kind, or on something else.
        """
        if not operation_id:
            raise InvalidRequestError("a command needs an operation_id of the caller's choice")
        found = self._by_id.get(operation_id)
        if found is not None:
            if found.what != what:
                raise AlreadyExistsError(f"operation {operation_id} is {found.what}, not {what}")
            return found
        operation = Operation(operation_id, what)
        self._by_id[operation_id] = operation
        operation.task = asyncio.create_task(
            operation.carry_out(work, self._on_end), name=f"operation-{operation_id}"
        )
        ended = [key for key, each in self._by_id.items() if each.ended]
        for key in ended[: max(0, len(self._by_id) - REMEMBERED)]:
            del self._by_id[key]
        return operation

    async def aclose(self) -> None:
        """Give up what still runs."""
        tasks = [each.task for each in self._by_id.values() if each.task is not None and not each.ended]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
