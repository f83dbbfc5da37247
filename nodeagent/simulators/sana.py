"""A simulated Sana worker: python -m nodeagent.simulators.sana --model sana-sprint-1.6b --port 8300.

It is a worker (see `_worker`) that paints a disc; `cut_mid_stream` gives out pictures that are not whole.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from aiohttp import web
from msgspec import Struct

from nodeagent.simulators._faults import Fault
from nodeagent.simulators._png import paint_png
from nodeagent.simulators._worker import RefusedError, SimulatedWorker, worker_main

_SIDE_PIXELS = 1024
_LARGEST_SIDE_PIXELS = 4096
_STEP_S = 0.3


class _Wanted(Struct, forbid_unknown_fields=True):
    """The body of `/generate`."""

    prompt: str
    negative_prompt: str = ""
    width: int = _SIDE_PIXELS
    height: int = _SIDE_PIXELS
    seed: int = 0
    steps: int = 1
    guidance_scale: float = 4.5


class SanaWorker(SimulatedWorker):
    """Its one picture at a time."""

    engine = "Sana"
    work_path = "/generate"
    work_bytes = 1_500_000_000

    def read(self, body: bytes) -> Callable[[], Awaitable[web.Response]]:
        """See `SimulatedWorker.read`."""
        try:
            wanted = msgspec.json.decode(body, type=_Wanted)
        except msgspec.DecodeError as error:
            raise RefusedError(400, str(error)) from error
        sides = (wanted.width, wanted.height)
        if not all(0 < side <= _LARGEST_SIDE_PIXELS and side % 32 == 0 for side in sides):
            raise RefusedError(400, f"width and height must be multiples of 32, not {sides}")
        if wanted.steps < 1:
            raise RefusedError(400, f"steps is {wanted.steps}; it must be at least 1")
        return lambda: self._paint(wanted)

    async def _paint(self, wanted: _Wanted) -> web.Response:
        await asyncio.sleep(_STEP_S * wanted.steps / self.settings.speed)
        picture = paint_png(msgspec.json.encode(wanted), wanted.width, wanted.height)
        if Fault.CUT_MID_STREAM in self.faults:
            picture = picture[: len(picture) // 2]
        return web.Response(body=picture, content_type="image/png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    return worker_main(SanaWorker, "sana_worker.py", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
