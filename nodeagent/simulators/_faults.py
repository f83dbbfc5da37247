"""What a simulated engine can be told to do wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from enum import StrEnum


class Fault(StrEnum):
    """One way in which real engines fail."""

    #: Exit half-way through loading, as on a corrupt file.
    DIE_WHILE_LOADING = "die_while_loading"
    #: Load for ever.
    NEVER_READY = "never_ready"
    #: Answer generations with a server error.
    HTTP_500 = "http_500"
    #: Accept a generation and send nothing, ever.
    HANG = "hang"
    #: Accept a question about health and send nothing, ever.
    HANG_HEALTH = "hang_health"
    #: Send a frame that is no JSON, then end without `[DONE]`.
    BROKEN_SSE = "broken_sse"
    #: Drop the connection in the middle of a frame.
    CUT_MID_STREAM = "cut_mid_stream"
    #: Send an error frame in mid-stream, and `[DONE]` after it, as vLLM does.
    ERROR_FRAME_THEN_DONE = "error_frame_then_done"
    #: Wait before the head of the answer.
    SLOW_FIRST_BYTE = "slow_first_byte"
    #: Say that memory will be given back, and keep it.
    FREE_IGNORED = "free_ignored"
    #: Die where there is too little memory, even if the real one usually survives that.
    OUT_OF_MEMORY_KILLS = "out_of_memory_kills"
    #: Listen from the start, and answer 503 until everything is loaded.
    LISTEN_WHILE_LOADING = "listen_while_loading"
    #: Fall asleep with most of the memory in hand.
    SLEEP_FREES_LITTLE = "sleep_frees_little"
    #: Die of being put to sleep while a request runs.
    CRASH_WHEN_SLEPT_BUSY = "crash_when_slept_busy"
    #: Accept whoever wants to be told of generations, and tell nothing.
    TELLS_NOTHING = "tells_nothing"
    #: Wait before waking.
    SLOW_WAKE = "slow_wake"


#: Faults in mid-stream show after this many tokens.
TOKENS_BEFORE_FAULT = 3


def parse_faults(names: Iterable[str]) -> frozenset[Fault]:
    """Faults by their names; blanks are skipped.

    Raises:
        ValueError: there is no such fault; the message lists those that there are.
    """
    found = set()
    for name in names:
        cleaned = name.strip()
        if not cleaned:
            continue
        try:
            found.add(Fault(cleaned))
        except ValueError:
            raise ValueError(f"no fault {cleaned!r}; there are {', '.join(Fault)}") from None
    return frozenset(found)


class Faults:
    """The faults that are on now. They may be switched while the engine runs."""

    def __init__(self, active: frozenset[Fault]) -> None:
        self._active = active
        self._switched = asyncio.Event()

    def __contains__(self, fault: Fault) -> bool:
        return fault in self._active

    def switch_to(self, active: frozenset[Fault]) -> None:
        """Replace all faults."""
        self._active = active
        self._switched.set()

    async def wait_until_off(self, fault: Fault) -> None:
        """Return when the fault is off."""
        while fault in self._active:
            self._switched.clear()
            await self._switched.wait()

    def names(self) -> list[str]:
        """The faults that are on, in order."""
        return sorted(self._active)
