"""How the interpreter is set in a process that serves."""

from __future__ import annotations

import gc
import sys

#: A thread that stores or measures holds up the event loop for at most so long; Python's default is 5 ms,
#: in which 20 streams could have begun.
_SWITCH_INTERVAL_S = 0.0005


def favour_event_loop() -> None:
    """Keep the event loop's thread from waiting. Call it once, when all that stays has been made.

    The cyclic collector looks less often, and never at what is there already: requests leave no cycles
    behind, and with its defaults it walks all jobs in memory many times a second. Other threads give the
    interpreter lock back sooner.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
