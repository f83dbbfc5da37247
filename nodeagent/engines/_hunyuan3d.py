"""Hunyuan3D: a picture becomes a mesh, by the `api_server.py` of version 2.0 or 2.1.

It says little, and some of what it says is not so:

- A job that was sent (`/send`) and failed is "processing" for ever, as is one that there never was. Only a
  deadline of ours tells.
- 2.1 never gives out a mesh that was sent without a texture: it stays "texturing". Such a mesh is made by
  `/generate`, during which the server answers nothing else, not even health.
- 2.0 writes its file while `/status` already gives it out, so that a part of it may come.
- Two jobs at once run at once, and run out of memory; so there is one at a time here.
- Nothing can be stopped or unloaded: see `Hunyuan3dAdapter`.
- 2.0 has no `/health`. 2.1 ignores the seed, and leaves a picture's background in it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import secrets
import struct
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import Struct

from nodeagent.engines._artifact import pieces_of
from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    Generation,
    LoadProgress,
    Probe,
)
from nodeagent.engines._loading import milestone, recognise
from nodeagent.engines._openai_relay import Answer, ask, guarded
from nodeagent.engines._service import NoOpenAiRoutes, require_dialect
from nodeagent.engines._tell import tell
from rung.codec import GenerationEvent
from rung.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineTimeoutError,
    EngineUnreachableError,
    InvalidRequestError,
)
from rung.service import EngineClient
from rung.types import DeploymentSpec, MeshInput, Phase, PhaseProgress

_CONTENT_TYPE = "model/gltf-binary"
_SEEDS = 2**32
_UID = re.compile(r"[0-9A-Za-z-]{1,64}")
#: A mesh of a million faces is 50 MB; base64 makes it a third longer, and 2.1 sends two.
_LARGEST_ANSWER_BYTES = 512 * 1024 * 1024
_SEND_TIMEOUT_S = 60.0
#: `/status` reads whole files inside the event loop.
_STATUS_TIMEOUT_S = 60.0
#: A file that is written while it is given out is whole soon after.
_WRITING_S = 30.0
_SAY_S = 10.0

_MILESTONES = (
    milestone(r"Fetching \d+ files:\s+(?P<percent>\d+)%", "fetching its files"),
    milestone(r"Loading pipeline components\S*\s+(?P<percent>\d+)%", "loading its parts"),
    milestone(r"Loading the model (?P<model>\S+) on worker", "loading {model}"),
    milestone(r"Application startup complete|Uvicorn running on ", "ready"),
)


class _Health(Struct):
    worker_id: str = ""


class _Sent(Struct):
    uid: str = ""


class _Status(Struct):
    status: str
    model_base64: str = ""
    message: str = ""


class _Left(Struct, kw_only=True):
    """What the engine is at, as far as is known: it cannot be stopped when nobody wants it any more.

    Attributes:
        worker_id: process that does it; empty of 2.0, which does not say.
        uid: job; empty if its name is not known.
        blocks: nothing else is answered meanwhile.
        until_s: when it is taken for failed, by the event loop's clock.
    """

    worker_id: str
    uid: str = ""
    blocks: bool = False
    until_s: float


class Hunyuan3dAdapter(NoOpenAiRoutes):
    """Has one server of Hunyuan3D make meshes, one at a time.

    What was begun goes on in the engine when its caller leaves: its mesh is thrown away, and the next
    generation waits for it, and says so. An agent that was restarted knows nothing of that.

    Args:
        client: connections to engines.
        poll_s: time between two questions about a job.
        shape_timeout_s: after so long without a shape it has failed.
        texture_timeout_s: after so long without a texture it has failed.
        writing_s: longest time for which a file may be given out that is not whole.
    """

    engine_name = "Hunyuan3D"

    def __init__(
        self,
        client: EngineClient,
        *,
        poll_s: float = 1.0,
        shape_timeout_s: float = 300.0,
        texture_timeout_s: float = 600.0,
        writing_s: float = _WRITING_S,
    ) -> None:
        self._client = client
        self._poll_s = poll_s
        self._shape_timeout_s = shape_timeout_s
        self._texture_timeout_s = texture_timeout_s
        self._writing_s = writing_s
        self._turn = asyncio.Lock()
        self._left: _Left | None = None

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """See `EngineAdapter.command_line`. Its model, and whether it paints, are for its runtime to say.

        Raises:
            InvalidRequestError: the spec is not for Hunyuan3D.
        """
        require_dialect(spec, "hunyuan3d")
        arguments = ("--host", listen_host, "--port", str(listen_port))
        return CommandLine(arguments=arguments, environment={"PYTHONUNBUFFERED": "1"})

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`. One that is silent because it makes a mesh for us is well."""
        found = await guarded(self._probe(base_url, spec))
        left = self._left
        if found.health is EngineHealth.UNWELL and left is not None and _now_s() < left.until_s:
            return Probe(health=EngineHealth.READY, detail="it is at a mesh, and answers nothing else")
        return found

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`. A percentage is that of the step which `detail` names."""
        return recognise(_MILESTONES, line.strip())

    async def generate(
        self, base_url: str, spec: DeploymentSpec, generation: Generation
    ) -> AsyncGenerator[GenerationEvent, None]:
        """See `GenerateControl.generate`. Closed early, the engine carries on all the same."""
        wanted = generation.input
        body = _body(spec, wanted)
        assert isinstance(wanted, MeshInput)
        if self._turn.locked():
            yield _queued(f"{spec.id} makes another mesh first; it makes one at a time")
        async with self._turn:
            async with aclosing(self._until_free(base_url, spec)) as waiting:
                async for step in waiting:
                    yield step
            worker_id = await self._worker_id(base_url, spec)
            making: AsyncGenerator[PhaseProgress | bytes, None]
            if worker_id and not wanted.texture:
                making = self._make_at_once(base_url, spec, body, worker_id, generation.idle_timeout_s)
            else:
                making = self._make_by_sending(
                    base_url, spec, body, worker_id, generation.idle_timeout_s, texture=wanted.texture
                )
            mesh = b""
            async with aclosing(making):
                async for made in making:
                    if isinstance(made, bytes):
                        mesh = made
                    else:
                        yield made
        for piece in pieces_of("0", _CONTENT_TYPE, mesh):
            yield piece

    async def _until_free(self, base_url: str, spec: DeploymentSpec) -> AsyncGenerator[PhaseProgress, None]:
        """Wait for what the engine is still at, though nobody wants it any more.

        Raises:
            EngineTimeoutError: it is at it for longer than that may take, and answers nothing.
            EngineUnreachableError: it is gone.
        """
        said_s = float("-inf")
        while (left := self._left) is not None:
            now_s = _now_s()
            if await self._is_over(base_url, spec, left):
                break
            if now_s >= left.until_s:
                if left.blocks:
                    raise EngineTimeoutError(
                        f"{spec.id} answers nothing since a mesh that was given up; only a stop ends that",
                        engine=spec.id,
                    )
                break
            if now_s - said_s >= _SAY_S:
                said_s = now_s
                yield _queued(
                    f"{spec.id} is still at a mesh that was given up, and cannot be stopped; "
                    f"{left.until_s - now_s:.0f} s more at most"
                )
            await asyncio.sleep(self._poll_s)
        self._left = None

    async def _is_over(self, base_url: str, spec: DeploymentSpec, left: _Left) -> bool:
        try:
            worker_id = await self._worker_id(base_url, spec)
        except EngineTimeoutError:
            return False
        if left.blocks or worker_id != left.worker_id:
            # Who answers does nothing that blocks; another process knows nothing of it.
            return True
        if not left.uid:
            return False
        return (await self._status(base_url, spec, left.uid)).status == "completed"

    async def _make_at_once(
        self, base_url: str, spec: DeploymentSpec, body: dict[str, Any], worker_id: str, idle_timeout_s: float
    ) -> AsyncGenerator[PhaseProgress | bytes, None]:
        """One request that is answered with the mesh; until then the server says nothing at all."""
        timeout_s = min(self._shape_timeout_s, idle_timeout_s)
        yield PhaseProgress(
            phase=Phase.GENERATING, detail=f"{spec.id} makes the shape; it says nothing meanwhile"
        )
        self._left = _Left(worker_id=worker_id, blocks=True, until_s=_now_s() + self._shape_timeout_s)
        answer = await self._post(base_url, spec, "/generate", body, timeout_s)
        self._left = None
        if answer.status != 200:
            raise _failure(spec, "/generate", answer)
        if not _is_whole(spec, answer.body):
            raise EngineProtocolError(f"{spec.id}: /generate answers with a part of a mesh")
        yield answer.body

    async def _make_by_sending(
        self,
        base_url: str,
        spec: DeploymentSpec,
        body: dict[str, Any],
        worker_id: str,
        idle_timeout_s: float,
        *,
        texture: bool,
    ) -> AsyncGenerator[PhaseProgress | bytes, None]:
        """A job that is sent, and then asked about until its mesh is there."""
        shape_s, texture_s = self._shape_timeout_s, self._texture_timeout_s if texture else 0.0
        # 2.0 does not tell the one from the other.
        longest_s = {"processing": shape_s if worker_id else shape_s + texture_s, "texturing": texture_s}
        left = self._left = _Left(worker_id=worker_id, until_s=_now_s() + shape_s + texture_s)
        try:
            left.uid = await self._send(base_url, spec, body)
        except (EngineUnreachableError, EngineFailedError, InvalidRequestError):
            self._left = None
            raise
        state, since_s, patience_s, whole_by_s = "", 0.0, 0.0, None
        while True:
            found = await self._status(base_url, spec, left.uid)
            now_s = _now_s()
            if found.status == "completed":
                mesh = await asyncio.to_thread(_decoded, spec, found)
                if _is_whole(spec, mesh):
                    self._left = None
                    yield mesh
                    return
                whole_by_s = whole_by_s or now_s + self._writing_s
                if now_s >= whole_by_s:
                    self._left = None
                    raise EngineProtocolError(f"{spec.id}: its mesh is not whole, and stays so")
            elif found.status not in longest_s:
                self._left = None
                why = found.message or f"its status is {found.status!r}"
                raise EngineFailedError(f"{spec.id} has failed: {why}")
            else:
                if found.status != state:
                    state, since_s = found.status, now_s
                    patience_s = min(longest_s[state], idle_timeout_s)
                    if state == "texturing":
                        left.until_s = now_s + texture_s
                    yield PhaseProgress(
                        phase=Phase.GENERATING, detail=_doing(spec, state, texture, worker_id)
                    )
                if now_s - since_s >= patience_s:
                    raise EngineTimeoutError(
                        f"{spec.id} says {state!r} for {patience_s:g} s, as it does for ever of what has "
                        "failed; its log has the reason",
                        engine=spec.id,
                    )
            await asyncio.sleep(self._poll_s)

    async def _send(self, base_url: str, spec: DeploymentSpec, body: dict[str, Any]) -> str:
        answer = await self._post(base_url, spec, "/send", body, _SEND_TIMEOUT_S)
        if answer.status != 200:
            raise _failure(spec, "/send", answer)
        try:
            uid = msgspec.json.decode(answer.body, type=_Sent).uid
        except msgspec.DecodeError:
            uid = ""
        if not _UID.fullmatch(uid):
            raise EngineProtocolError(f"{spec.id}: /send answers without the name of a job")
        return uid

    async def _status(self, base_url: str, spec: DeploymentSpec, uid: str) -> _Status:
        url = f"{base_url.rstrip('/')}/status/{uid}"
        reply = await self._client.get(url, what=spec.id, timeout_s=_STATUS_TIMEOUT_S)
        pieces: list[bytes] = []
        size_bytes = 0
        async with reply:
            async for piece in reply.chunks():
                size_bytes += len(piece)
                if size_bytes > _LARGEST_ANSWER_BYTES:
                    raise EngineProtocolError(f"{spec.id}: /status answers with more than a mesh")
                pieces.append(piece)
        try:
            return await asyncio.to_thread(msgspec.json.decode, b"".join(pieces), type=_Status)
        except msgspec.DecodeError as error:
            raise EngineProtocolError(
                f"{spec.id}: /status answers {reply.status} without a status"
            ) from error

    async def _post(
        self, base_url: str, spec: DeploymentSpec, path: str, body: dict[str, Any], timeout_s: float
    ) -> Answer:
        encoded = msgspec.json.encode(body)
        return await tell(self._client, base_url, path, encoded, what=spec.id, timeout_s=timeout_s)

    async def _worker_id(self, base_url: str, spec: DeploymentSpec) -> str:
        """Which process it is; empty for 2.0, which has no health, and is then known by its `/status`.

        Raises:
            EngineProtocolError: it is neither.
            EngineUnreachableError, EngineTimeoutError: as the engine client does.
        """
        answer = await ask(self._client, base_url, "/health", what=spec.id)
        try:
            if answer.status == 404:
                status = await ask(self._client, base_url, "/status/none", what=spec.id)
                msgspec.json.decode(status.body, type=_Status)
                return ""
            return msgspec.json.decode(answer.body, type=_Health).worker_id or "unnamed"
        except msgspec.DecodeError as error:
            raise EngineProtocolError(f"{spec.id}: what listens there is no Hunyuan3D") from error

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        # Its port opens when its models are loaded.
        await self._worker_id(base_url, spec)
        return Probe(health=EngineHealth.READY)


def _body(spec: DeploymentSpec, wanted: object) -> dict[str, Any]:
    """What is asked of the server.

    Raises:
        InvalidRequestError: it cannot be asked of this one.
    """
    if not isinstance(wanted, MeshInput):
        raise InvalidRequestError(f"{spec.id}: Hunyuan3D makes meshes, and nothing else")
    if wanted.image is None or not wanted.image.data:
        raise InvalidRequestError(f"{spec.id}: Hunyuan3D models a picture, and there is none")
    seed = secrets.randbelow(_SEEDS) if wanted.seed is None else wanted.seed
    if not 0 <= seed < _SEEDS:
        raise InvalidRequestError(f"{spec.id}: seed is {seed}; it must be 0 to {_SEEDS - 1}")
    return {
        "image": base64.b64encode(wanted.image.data).decode(),
        "seed": seed,
        "texture": wanted.texture,
        # Of anything else `/status` never learns.
        "type": "glb",
    }


def _doing(spec: DeploymentSpec, state: str, texture: bool, worker_id: str) -> str:
    if state == "texturing":
        return f"{spec.id} paints the mesh"
    return f"{spec.id} makes the shape{' and paints it' if texture and not worker_id else ''}"


def _queued(detail: str) -> PhaseProgress:
    return PhaseProgress(phase=Phase.QUEUED, detail=detail)


def _decoded(spec: DeploymentSpec, found: _Status) -> bytes:
    try:
        return base64.b64decode(found.model_base64, validate=True)
    except binascii.Error as error:
        raise EngineProtocolError(f"{spec.id}: its mesh is no base64: {error}") from error


def _is_whole(spec: DeploymentSpec, mesh: bytes) -> bool:
    """Whether a file has all of its bytes.

    Raises:
        EngineProtocolError: it is no binary glTF 2.0.
    """
    if len(mesh) < 12:
        return False
    magic, version, length_bytes = struct.unpack_from("<4sII", mesh)
    if magic != b"glTF" or version != 2 or length_bytes < len(mesh):
        raise EngineProtocolError(f"{spec.id}: what it made is no binary glTF 2.0")
    return bool(length_bytes == len(mesh))


def _failure(spec: DeploymentSpec, path: str, answer: Answer) -> EngineFailedError | InvalidRequestError:
    """What a refusal means. Its 404 is any failure at all, and its text tells nothing."""
    if answer.status == 422:
        return InvalidRequestError(
            f"{spec.id}: {path} refuses the request: {answer.body[:300].decode(errors='replace')}"
        )
    return EngineFailedError(
        f"{spec.id} could not make the mesh: {path} answers {answer.status}; its log has the reason",
        engine_status=str(answer.status),
    )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
