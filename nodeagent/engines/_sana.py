"""Sana: a worker that makes a picture in one step, or in a few.

Sana has no server of its own: this is a worker (see `_worker`) whose work is `POST /generate`:
`{"prompt", "negative_prompt", "width", "height", "seed", "steps", "guidance_scale"}`, of which all but the
prompt may be left out; the answer is one picture as `image/png`. A worker makes one picture at a time and
cannot be stopped in the middle of one: it is over in a second.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections.abc import AsyncGenerator
from typing import Any

from nodeagent.engines._artifact import pieces_of
from nodeagent.engines._base import Generation
from nodeagent.engines._openai_relay import Answer
from nodeagent.engines._worker import WorkerAdapter, busy_pause_s
from rung.codec import GenerationEvent
from rung.errors import EngineFailedError, EngineProtocolError, EngineTimeoutError, InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec, ImageInput, Phase, PhaseProgress

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_SEEDS = 2**32
#: What of `ImageInput.parameters` a worker takes, with the types of their values.
_PARAMETERS: dict[str, tuple[type, ...]] = {"steps": (int,), "guidance_scale": (int, float)}


class SanaAdapter(WorkerAdapter):
    """Has a Sana worker make pictures, one after the other."""

    def __init__(self, client: EngineClient) -> None:
        super().__init__(client, dialect="sana")

    async def generate(
        self, base_url: str, spec: DeploymentSpec, generation: Generation
    ) -> AsyncGenerator[GenerationEvent, None]:
        """See `GenerateControl.generate`. The picture number i, from 0, has the seed + i."""
        wanted = generation.input
        if not isinstance(wanted, ImageInput):
            raise InvalidRequestError(f"{spec.id}: Sana makes pictures, and nothing else")
        body = _body(spec, wanted)
        first_seed = secrets.randbelow(_SEEDS) if wanted.seed is None else wanted.seed
        for index in range(wanted.count):
            seed = (first_seed + index) % _SEEDS
            which = f"picture {index + 1} of {wanted.count}, " if wanted.count > 1 else ""
            detail = f"{which}seed {seed}"
            deadline_s = asyncio.get_running_loop().time() + generation.idle_timeout_s
            while True:
                yield PhaseProgress(phase=Phase.SAMPLING, detail=detail)
                try:
                    answer = await self.work(
                        base_url,
                        spec,
                        "/generate",
                        {**body, "seed": seed},
                        timeout_s=generation.idle_timeout_s,
                    )
                    break
                except EngineFailedError as error:
                    pause_s = busy_pause_s(error)
                    if pause_s is None:
                        raise
                    if asyncio.get_running_loop().time() + pause_s > deadline_s:
                        raise EngineTimeoutError(
                            f"{spec.id} was busy with something else for {generation.idle_timeout_s:g} s"
                        ) from error
                yield PhaseProgress(phase=Phase.QUEUED, detail=f"{spec.id} is busy with something else")
                await asyncio.sleep(pause_s)
            _require_png(spec, answer)
            for piece in pieces_of(str(index), "image/png", answer.body):
                yield piece


def _body(spec: DeploymentSpec, wanted: ImageInput) -> dict[str, Any]:
    """What is asked of the worker, all but the seed.

    Raises:
        InvalidRequestError: Sana cannot do this; the message says what.
    """
    if wanted.operation != "generate" or wanted.images:
        raise InvalidRequestError(
            f"{spec.id}: Sana makes pictures from words; {wanted.operation} from a picture is for ComfyUI"
        )
    if not wanted.prompt.strip():
        raise InvalidRequestError(f"{spec.id}: prompt is empty; say what to draw")
    if wanted.seed is not None and not 0 <= wanted.seed < _SEEDS:
        raise InvalidRequestError(f"{spec.id}: seed is {wanted.seed}; it must be 0 to {_SEEDS - 1}")
    for name, value in wanted.parameters.items():
        kinds = _PARAMETERS.get(name)
        if kinds is None:
            raise InvalidRequestError(
                f"{spec.id}: Sana has no parameter {name!r}; it has {', '.join(_PARAMETERS)}"
            )
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InvalidRequestError(f"{spec.id}: {name} is {value!r}; it must be a number")
    given = {
        "negative_prompt": wanted.negative_prompt,
        "width": wanted.width_pixels,
        "height": wanted.height_pixels,
    }
    said = {name: value for name, value in given.items() if value}
    return {"prompt": wanted.prompt, **said, **wanted.parameters}


def _require_png(spec: DeploymentSpec, answer: Answer) -> None:
    """Raises EngineProtocolError: it is no whole picture."""
    body = answer.body
    whole = body.startswith(_PNG) and body.endswith(_PNG_END) and len(body) > len(_PNG) + 25
    if not whole or not all(struct.unpack_from(">II", body, 16)):
        raise EngineProtocolError(f"{spec.id}: /generate answers with {len(body)} bytes that are no PNG")
