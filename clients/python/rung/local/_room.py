"""Who gives way for whom: values in, values out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import StrEnum

from msgspec import Struct


class ModelState(StrEnum):
    """Where a model is."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"


class LocalModel(Struct, frozen=True, kw_only=True):
    """A registered model as it is.

    Attributes:
        name: as it was registered.
        state: where it is.
        size_bytes: what it takes when loaded: as measured the last time, else as declared.
        users: uses that go on.
        last_used: grows with each use of any model; 0 for never.
    """

    name: str
    state: ModelState
    size_bytes: int
    users: int = 0
    last_used: int = 0

    @property
    def holds_memory(self) -> bool:
        """Whether its bytes are taken, or spoken for."""
        return self.state is not ModelState.UNLOADED


def bytes_missing(
    models: Collection[LocalModel], wanted: LocalModel, *, budget_bytes: int | None, free_bytes: int | None
) -> int:
    """How much has to be given back before a model can be loaded; 0 or less for nothing.

    Args:
        models: all of them.
        wanted: the one to load; it counts once.
        budget_bytes: for all models together; None for no such bound.
        free_bytes: measured on the device; None where nothing is measured.
    """
    missing: list[int] = [0]
    if budget_bytes is not None:
        held_bytes = sum(each.size_bytes for each in models if each.holds_memory and each.name != wanted.name)
        missing.append(held_bytes + wanted.size_bytes - budget_bytes)
    if free_bytes is not None:
        # What is being loaded is not measured yet, or not all of it.
        on_the_way = [each for each in models if each.state is ModelState.LOADING]
        spoken_for_bytes = sum(each.size_bytes for each in on_the_way if each.name != wanted.name)
        missing.append(spoken_for_bytes + wanted.size_bytes - free_bytes)
    return max(missing)


def victims(models: Collection[LocalModel], missing_bytes: int) -> tuple[str, ...] | None:
    """The idle models that give way, longest unused first; None if all of them would not be enough.

    One that does not help after all, because a later one is large enough by itself, is spared.
    """
    idle = [each for each in models if each.state is ModelState.LOADED and not each.users]
    idle.sort(key=lambda each: each.last_used)
    chosen: list[LocalModel] = []
    given_bytes = 0
    for each in idle:
        if given_bytes >= missing_bytes:
            break
        chosen.append(each)
        given_bytes += each.size_bytes
    if given_bytes < missing_bytes:
        return None
    # The ones used last are spared first.
    for each in reversed(tuple(chosen)):
        if given_bytes - each.size_bytes >= missing_bytes:
            chosen.remove(each)
            given_bytes -= each.size_bytes
    return tuple(each.name for each in chosen)


def grouped(names: Sequence[str], loaded: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The places of requests by model: loaded models first, then in the order of their first request.

    Args:
        names: the model of each request.
        loaded: models that need no loading.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    order = sorted(places, key=lambda name: (name not in loaded, places[name][0]))
    return tuple((name, tuple(places[name])) for name in order)
