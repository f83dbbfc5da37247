"""The models of a process, and who of them is loaded."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self, TypeVar

from rung._sizes import parse_size
from rung.errors import DeadlineExceededError, InvalidRequestError, UnknownModelError, VramInfeasibleError
from rung.local._leases import LeaseSource, Lost
from rung.local._memory import Memory, cuda_memory
from rung.local._room import LocalModel, ModelState, bytes_missing, grouped, victims

_log = logging.getLogger("rung.local")

T = TypeVar("T")
R = TypeVar("R")

#: Memory that nobody in this process gives back may still become free, so it is looked at this often.
_LOOK_S = 0.5
_CHANGING = (ModelState.LOADING, ModelState.UNLOADING)


class _Entry:
    """A registered model; what changes of it is guarded by the manager's condition."""

    __slots__ = (
        "held",
        "last_used",
        "lease_lost",
        "load",
        "model",
        "name",
        "size_bytes",
        "state",
        "unload",
        "users",
    )

    def __init__(
        self, name: str, load: Callable[[], Any], unload: Callable[[Any], object] | None, size_bytes: int
    ) -> None:
        self.name = name
        self.load = load
        self.unload = unload
        self.size_bytes = size_bytes
        self.state = ModelState.UNLOADED
        self.model: Any = None
        #: Uses that go on, by thread.
        self.users: Counter[int] = Counter()
        self.last_used = 0
        self.held = ExitStack()
        self.lease_lost: Lost | None = None

    def value(self) -> LocalModel:
        return LocalModel(
            name=self.name,
            state=self.state,
            size_bytes=self.size_bytes,
            users=self.users.total(),
            last_used=self.last_used,
        )


class ModelManager:
    """Loads models when they are used, and lets the one used longest ago give way. Safe between threads.

    A model is loaded once, however many threads ask for it, and never unloaded while it is used. Whoever
    needs room that others use waits for them, longest waiter first. Models load and unload outside the
    lock: using one that is loaded does not wait for another one to load.

    Args:
        budget: bytes for all models together, such as `22GiB`; None for all that the device has free.
        memory: measures the device; None for the CUDA device 0, where PyTorch was imported and sees one.
        leases: holds each loaded model's memory; see `leases_of`. It makes room on the device, too.
        patience_s: once somebody has waited for room so long, whoever comes new waits behind, so that models
            that are used all the time become idle at last.

    Raises:
        InvalidRequestError: without a budget, and with nothing to measure, or with leases.
    """

    def __init__(
        self,
        budget: int | str | None = None,
        *,
        memory: Memory | None = None,
        leases: LeaseSource | None = None,
        patience_s: float = 2.0,
    ) -> None:
        self._memory = memory if memory is not None else cuda_memory()
        self._budget_bytes = None if budget is None else _bytes(budget, "budget")
        if self._budget_bytes is None and self._memory is None:
            raise InvalidRequestError(
                "give a budget, such as 22GiB: there is no CUDA device to measure (import torch first)"
            )
        if self._budget_bytes is None and leases is not None:
            raise InvalidRequestError("give a budget: how much to hold leases for at most")
        self._leases = leases
        self._patience_s = patience_s
        self._entries: dict[str, _Entry] = {}
        self._changed = threading.Condition()
        self._uses = 0
        #: Grows with every load and unload that begins: what was measured across two of them says nothing.
        self._moves = 0
        #: Those who wait for room, longest first, and since when.
        self._waiting: dict[object, float] = {}

    def register(
        self,
        name: str,
        load: Callable[[], Any],
        size: int | str,
        *,
        unload: Callable[[Any], object] | None = None,
    ) -> None:
        """Make a model known; nothing is loaded.

        Args:
            name: unique.
            load: makes the model; called in the thread that first uses it.
            size: bytes that it takes, such as `2.5GiB`; replaced by what is measured, where that is possible.
            unload: called with the model before it is dropped.

        Raises:
            InvalidRequestError: the name is taken, or the size is none.
            VramInfeasibleError: it is larger than the budget.
        """
        size_bytes = _bytes(size, f"size of {name}")
        if self._budget_bytes is not None and size_bytes > self._budget_bytes:
            raise VramInfeasibleError(
                f"{name} takes {size_bytes:,} bytes, and all models together may take {self._budget_bytes:,}"
            )
        with self._changed:
            if name in self._entries:
                raise InvalidRequestError(f"there is a model {name} already")
            self._entries[name] = _Entry(name, load, unload, size_bytes)

    @property
    def models(self) -> tuple[LocalModel, ...]:
        """The models as they are now."""
        with self._changed:
            return self._values()

    @contextmanager
    def use(self, name: str, *, timeout_s: float | None = None) -> Iterator[Any]:
        """The model, loaded; it stays so while the context lasts.

        Args:
            name: which.
            timeout_s: how long to wait for room; None for as long as it takes.

        Raises:
            UnknownModelError: it was not registered.
            VramInfeasibleError: there is no room, and waiting does not help: this thread uses what is in the
                way itself, or other programs do and nothing here could give way.
            DeadlineExceededError: there was no room in time.
            Exception: as its loader; it counts as not loaded then.
        """
        entry = self._acquire(name, timeout_s)
        try:
            yield entry.model
        finally:
            me = threading.get_ident()
            with self._changed:
                entry.users[me] -= 1
                if not entry.users[me]:
                    del entry.users[me]
                self._changed.notify_all()

    def map(self, requests: Iterable[tuple[str, T]], run: Callable[[Any, T], R]) -> list[R]:
        """Carry out requests of several models, those of one model together; the results keep their order.

        Args:
            requests: model and payload of each.
            run: called with the loaded model and the payload.

        Raises:
            Exception: as `use` and `run`; what comes after it is not carried out.
        """
        wanted: Sequence[tuple[str, T]] = tuple(requests)
        with self._changed:
            for name, _ in wanted:
                self._known(name)
            loaded = [each.name for each in self._values() if each.state is ModelState.LOADED]
        results: dict[int, R] = {}
        for name, places in grouped([name for name, _ in wanted], loaded):
            with self.use(name) as model:
                for place in places:
                    results[place] = run(model, wanted[place][1])
        return [results[place] for place in range(len(wanted))]

    def unload(self, name: str) -> bool:
        """Unload a model that nobody uses; False if it is used, or not loaded. Raises UnknownModelError."""
        with self._changed:
            entry = self._known(name)
            if entry.state is not ModelState.LOADED or entry.users:
                return False
            entry.state = ModelState.UNLOADING
            self._moves += 1
        self._unload(entry)
        return True

    def close(self) -> None:
        """Unload every model that nobody uses, and give its lease back."""
        for each in self.models:
            self.unload(each.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _acquire(self, name: str, timeout_s: float | None) -> _Entry:
        """Count a use of a model, and load it first where that is needed."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        ticket = object()
        me = threading.get_ident()
        try:
            while True:
                with self._changed:
                    entry = self._known(name)
                    giving_way = self._step(entry, ticket, me, deadline_s)
                    if giving_way is None:
                        continue
                    if entry.state is ModelState.LOADED:
                        return entry
                for each in giving_way:
                    self._unload(each)
                if entry in giving_way:
                    continue
                if self._is_short(entry):
                    # It freed less than was expected, or somebody else took it: another round.
                    self._give_up(entry, me)
                    continue
                self._load(entry, me)
                return entry
        finally:
            with self._changed:
                if self._waiting.pop(ticket, None) is not None:
                    self._changed.notify_all()

    def _step(
        self, entry: _Entry, ticket: object, me: int, deadline_s: float | None
    ) -> tuple[_Entry, ...] | None:
        """Take the use, or the turn to load after those returned gave way; None after having waited."""
        if entry.state is ModelState.LOADED and not self._is_stale(entry):
            if self._may_pass(ticket, me):
                self._count(entry, me)
                return ()
        elif entry.state in (ModelState.UNLOADED, ModelState.LOADED):
            self._waiting.setdefault(ticket, time.monotonic())
            first = next(iter(self._waiting)) is ticket
            giving_way = self._giving_way(entry, me) if first else None
            if giving_way is not None:
                del self._waiting[ticket]
                self._moves += 1
                for each in giving_way:
                    each.state = ModelState.UNLOADING
                if entry not in giving_way:
                    entry.state = ModelState.LOADING
                    self._count(entry, me)
                return giving_way
        self._wait(entry, deadline_s)
        return None

    def _may_pass(self, ticket: object, me: int) -> bool:
        """Whether one more use is right: not once somebody has waited for long for models to become idle.

        Who uses any already may use more, or the one who waits would wait for it for ever.
        """
        first, since_s = next(iter(self._waiting.items()), (ticket, 0.0))
        if first is ticket or time.monotonic() - since_s < self._patience_s:
            return True
        return self._uses_any(me)

    def _uses_any(self, me: int) -> bool:
        return any(me in each.users for each in self._entries.values())

    def _giving_way(self, entry: _Entry, me: int) -> tuple[_Entry, ...] | None:
        """Who gives way for a model; None if that has to be waited for. Raises VramInfeasibleError."""
        if entry.state is ModelState.LOADED:
            # Its lease was lost: the memory may be somebody else's, and it has to be taken anew.
            return None if entry.users else (entry,)
        models, wanted = self._values(), entry.value()
        free_bytes = None if self._measures is None else self._measures.free_bytes()
        missing_bytes = bytes_missing(models, wanted, budget_bytes=self._budget_bytes, free_bytes=free_bytes)
        if missing_bytes <= 0:
            return ()
        chosen = victims(models, missing_bytes)
        if chosen is not None:
            return tuple(self._entries[name] for name in chosen)
        others = [each for each in self._entries.values() if each is not entry]
        in_use = [each for each in others if each.users]
        if any(each.state in _CHANGING and not each.users for each in others):
            return None
        if any(set(each.users) != {me} for each in in_use):
            return None
        if in_use:
            raise VramInfeasibleError(
                f"no room for {entry.name}: this thread uses {', '.join(each.name for each in in_use)} "
                "itself, which would have to give way; leave it first"
            )
        there = "" if free_bytes is None else f", {free_bytes:,} are free"
        raise VramInfeasibleError(
            f"no room for {entry.name}: it takes {entry.size_bytes:,} bytes{there}, and nothing of this "
            "process that gave way would be enough; see `rung status` for who holds the rest"
        )

    def _count(self, entry: _Entry, me: int) -> None:
        self._uses += 1
        entry.last_used = self._uses
        entry.users[me] += 1

    def _give_up(self, entry: _Entry, me: int) -> None:
        """Take back the turn to load."""
        with self._changed:
            entry.users[me] -= 1
            if not entry.users[me]:
                del entry.users[me]
            entry.state = ModelState.UNLOADED
            self._changed.notify_all()

    def _is_stale(self, entry: _Entry) -> bool:
        return entry.lease_lost is not None and entry.lease_lost()

    def _is_short(self, entry: _Entry) -> bool:
        """Whether the device has less free than a model takes that is about to be loaded."""
        return self._measures is not None and self._measures.free_bytes() < entry.size_bytes

    @property
    def _measures(self) -> Memory | None:
        """What says whether there is room; None where a budget, or a lease, is the only bound."""
        return self._memory if self._leases is None else None

    def _wait(self, entry: _Entry, deadline_s: float | None) -> None:
        left_s = _LOOK_S if deadline_s is None else min(_LOOK_S, deadline_s - time.monotonic())
        if left_s <= 0:
            used = [each.name for each in self._entries.values() if each.users and each is not entry]
            raise DeadlineExceededError(
                f"no room for {entry.name} in time; in use are {', '.join(used) or 'no others'}"
            )
        self._changed.wait(left_s)

    def _load(self, entry: _Entry, me: int) -> None:
        """Load a model whose turn it is. Raises as its loader, and as the lease."""
        with self._changed:
            moves = self._moves
            alone = not any(each.state in _CHANGING for each in self._entries.values() if each is not entry)
        before_bytes = 0 if self._memory is None else self._memory.free_bytes()
        try:
            if self._leases is not None:
                entry.lease_lost = entry.held.enter_context(self._leases(entry.size_bytes, entry.name))
            model = entry.load()
        except BaseException:
            self._drop(entry)
            self._give_up(entry, me)
            raise
        measured_bytes = 0 if self._memory is None else before_bytes - self._memory.free_bytes()
        with self._changed:
            if alone and moves == self._moves and measured_bytes > 0:
                entry.size_bytes = measured_bytes
            entry.model = model
            entry.state = ModelState.LOADED
            self._changed.notify_all()

    def _unload(self, entry: _Entry) -> None:
        """Unload a model that nobody uses. One whose unloader fails counts as unloaded: it is dropped."""
        model, entry.model = entry.model, None
        try:
            if entry.unload is not None:
                entry.unload(model)
        except Exception:  # noqa: BLE001 - whatever it is, the model is dropped
            _log.exception("%s was not unloaded well", entry.name)
        del model
        self._drop(entry)
        with self._changed:
            entry.state = ModelState.UNLOADED
            self._changed.notify_all()

    def _drop(self, entry: _Entry) -> None:
        """Give back the memory, then the lease of it."""
        if self._memory is not None:
            self._memory.give_back()
        entry.lease_lost = None
        entry.held.close()

    def _known(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            there = ", ".join(sorted(self._entries)) or "none"
            raise UnknownModelError(f"there is no model {name!r}; there are: {there}", model=name)
        return entry

    def _values(self) -> tuple[LocalModel, ...]:
        return tuple(each.value() for each in self._entries.values())


def _bytes(size: int | str, what: str) -> int:
    try:
        found = parse_size(size)
    except ValueError as error:
        raise InvalidRequestError(f"{what}: {error}") from None
    if not isinstance(found, int) or found <= 0:
        raise InvalidRequestError(f"{what} is {size!r}; it must be more than nothing, such as 2.5GiB")
    return found
