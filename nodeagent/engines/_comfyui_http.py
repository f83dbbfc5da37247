"""The routes of ComfyUI that a generation needs, over connections of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from msgspec import Struct

from rung.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineTimeoutError,
    EngineUnreachableError,
    RungError,
)
from rung.types import WorkflowFile

_T = TypeVar("_T")
_CONNECT_TIMEOUT_S = 5.0
#: While it loads a model, Python has little time for its own server.
_ANSWER_TIMEOUT_S = 20.0
_UPLOAD_TIMEOUT_S = 300.0
#: Idle connections are dropped before ComfyUI's side can race a new request.
_KEEPALIVE_S = 4.0
#: `/queue` holds whole graphs, and `/object_info` is some megabytes where there are many custom nodes.
_MAX_ANSWER_BYTES = 128 * 1024 * 1024
#: Uploads go to a folder of their own under ComfyUI's `input`.
_UPLOAD_FOLDER = "rung"


class StoredFile(Struct, frozen=True, kw_only=True):
    """A file in one of ComfyUI's folders, as it names them: `input`, `output` or `temp`."""

    filename: str
    subfolder: str = ""
    type: str = "output"


class HistoryStatus(Struct, frozen=True):
    """How a prompt ended. `messages` are pairs of an event and its data."""

    status_str: str = ""
    completed: bool = False
    messages: list[Any] = []


class HistoryEntry(Struct, frozen=True):
    """A prompt that ended: what its output nodes showed, by node."""

    outputs: dict[str, Any] = {}
    #: Old versions have none.
    status: HistoryStatus | None = None


class QueuePlace(Struct, frozen=True):
    """Where a prompt is. `ahead` counts those before it, the running one too; None if it is not there."""

    prompt_id: str = ""
    running: bool = False
    ahead: int | None = None


class Submitted(Struct, frozen=True):
    """The answer of `/prompt`."""

    prompt_id: str
    node_errors: dict[str, Any] | list[Any] | None = None


class RefusedError(Exception):
    """ComfyUI did not take a graph, or a file."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class _Queue(Struct):
    queue_running: list[list[Any]]
    queue_pending: list[list[Any]]


class _Uploaded(Struct):
    name: str
    subfolder: str = ""
    type: str = "input"


class ComfyUiHttp:
    """Questions to one ComfyUI. An async context manager; what it raises is named in each method.

    Every method raises EngineUnreachableError, EngineTimeoutError and EngineProtocolError as the engine
    client does.

    Args:
        base_url: where ComfyUI listens.
        what: name of the deployment, for messages.
    """

    def __init__(self, base_url: str, what: str) -> None:
        self._base_url = base_url.rstrip("/")
        self.what = what
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(keepalive_timeout=_KEEPALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "rung"},
        )

    async def __aenter__(self) -> ComfyUiHttp:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def node_class(self, name: str) -> dict[str, Any] | None:
        """What `/object_info` says of one class of nodes; None if there is none."""
        found = await self._get(f"/object_info/{quote(name, safe='')}", dict[str, dict[str, Any]])
        return found.get(name)

    async def node_classes(self) -> dict[str, dict[str, Any]]:
        """What `/object_info` says of all classes."""
        return await self._get("/object_info", dict[str, dict[str, Any]])

    async def upload(self, file: WorkflowFile, name: str) -> str:
        """Store a file for graphs to read; returns how a graph has to name it.

        Raises:
            RefusedError: it is not taken; the status says why.
        """
        form = aiohttp.FormData()
        form.add_field("image", file.data, filename=name, content_type=file.content_type)
        form.add_field("type", "input")
        form.add_field("subfolder", _UPLOAD_FOLDER)
        status, body = await self._exchange("POST", "/upload/image", data=form, timeout_s=_UPLOAD_TIMEOUT_S)
        if status != 200:
            raise RefusedError(status, body)
        stored = self._decoded(body, _Uploaded, "/upload/image")
        path = f"{stored.subfolder}/{stored.name}" if stored.subfolder else stored.name
        return path if stored.type == "input" else f"{path} [{stored.type}]"

    async def submit(
        self, graph: dict[str, Any], *, prompt_id: str, client_id: str, extra_data: dict[str, Any]
    ) -> Submitted:
        """Put a graph in the queue.

        Raises:
            RefusedError: it is not taken.
        """
        asked = {"prompt": graph, "prompt_id": prompt_id, "client_id": client_id, "extra_data": extra_data}
        status, body = await self._exchange("POST", "/prompt", data=msgspec.json.encode(asked))
        if status != 200:
            raise RefusedError(status, body)
        return self._decoded(body, Submitted, "/prompt")

    async def history(self, prompt_id: str) -> HistoryEntry | None:
        """How a prompt ended; None if it has not, or nothing is known of it."""
        return (await self._get(f"/history/{prompt_id}", dict[str, HistoryEntry])).get(prompt_id)

    async def place(self, prompt_id: str, client_id: str = "") -> QueuePlace:
        """Where a prompt is in the queue, by its id or, if one is given, by the client that it tells."""
        queue = await self._get("/queue", _Queue)
        for row in queue.queue_running:
            if _is(row, prompt_id, client_id):
                return QueuePlace(str(row[1]), running=True, ahead=0)
        mine = next((row for row in queue.queue_pending if _is(row, prompt_id, client_id)), None)
        if mine is None:
            return QueuePlace()
        # They come in the order of a heap.
        before = [row for row in queue.queue_pending if row[0] < mine[0]]
        return QueuePlace(str(mine[1]), ahead=len(queue.queue_running) + len(before))

    async def take_out(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, if it waits there. Nothing remains of it."""
        await self._told("/queue", {"delete": [prompt_id]})

    async def cancel_job(self, prompt_id: str) -> bool:
        """Cancel a prompt, whether it waits or runs; False if this version has no such route."""
        return await self._told(f"/api/jobs/{prompt_id}/cancel", {}, absent_is_fine=True)

    async def interrupt(self, prompt_id: str) -> None:
        """Have the running prompt stop. Old versions stop whichever runs: ask `place` directly before."""
        await self._told("/interrupt", {"prompt_id": prompt_id})

    @asynccontextmanager
    async def view(self, file: StoredFile, *, idle_timeout_s: float) -> AsyncIterator[FileReply]:
        """The bytes of a file.

        Raises:
            EngineFailedError: ComfyUI does not have it.
        """
        query = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        timeout = aiohttp.ClientTimeout(connect=_CONNECT_TIMEOUT_S, sock_read=idle_timeout_s)
        url = self._base_url + "/view"
        try:
            async with self._session.get(
                url, params=query, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise EngineFailedError(
                        f"{self.what}: ComfyUI says that it made {file.filename}, and answers "
                        f"{response.status} when it is asked for it",
                        engine_status=str(response.status),
                    )
                yield FileReply(response)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._failure(error, "/view") from error

    @asynccontextmanager
    async def socket(self, client_id: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """The WebSocket on which prompts of `client_id` are told of. Raises what aiohttp raises."""
        url = f"{self._base_url}/ws?clientId={client_id}"
        async with self._session.ws_connect(
            url, heartbeat=_ANSWER_TIMEOUT_S, max_msg_size=_MAX_ANSWER_BYTES
        ) as socket:
            yield socket

    async def _get(self, path: str, kind: type[_T]) -> _T:
        status, body = await self._exchange("GET", path)
        if status != 200:
            raise EngineProtocolError(f"{self.what}: {path} answers {status}", engine_status=str(status))
        return self._decoded(body, kind, path)

    async def _told(self, path: str, body: dict[str, Any], *, absent_is_fine: bool = False) -> bool:
        status, _ = await self._exchange("POST", path, data=msgspec.json.encode(body))
        if status == 200:
            return True
        if absent_is_fine and status in (404, 405):
            return False
        raise EngineProtocolError(f"{self.what}: {path} answers {status}", engine_status=str(status))

    async def _exchange(
        self,
        method: Literal["GET", "POST"],
        path: str,
        *,
        data: bytes | aiohttp.FormData | None = None,
        timeout_s: float = _ANSWER_TIMEOUT_S,
    ) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_TIMEOUT_S)
        headers = {"Content-Type": "application/json"} if isinstance(data, bytes) else None
        try:
            async with self._session.request(
                method,
                self._base_url + path,
                data=data,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                return response.status, await self._read(response, path)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._failure(error, path) from error

    async def _read(self, response: aiohttp.ClientResponse, path: str) -> bytes:
        pieces: list[bytes] = []
        size = 0
        async for piece in response.content.iter_any():
            size += len(piece)
            if size > _MAX_ANSWER_BYTES:
                raise EngineProtocolError(
                    f"{self.what} answers {path} with more than {_MAX_ANSWER_BYTES} bytes"
                )
            pieces.append(piece)
        return b"".join(pieces)

    def _decoded(self, body: bytes, kind: type[_T], path: str) -> _T:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as error:
            raise EngineProtocolError(
                f"{self.what}: {path} answers with what is not ComfyUI's: {error}"
            ) from error

    def _failure(self, error: Exception, path: str) -> RungError:
        match error:
            case TimeoutError():
                return EngineTimeoutError(f"{self.what} has not answered {path} in time", engine=self.what)
            case aiohttp.ClientPayloadError() | aiohttp.ClientResponseError():
                return EngineProtocolError(
                    f"the connection to {self.what} broke in the answer of {path}: {error}", engine=self.what
                )
            case _:
                return EngineUnreachableError(f"{self.what} cannot be reached: {error}", engine=self.what)


class FileReply:
    """A file as it comes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.content_type = response.content_type
        #: 0 if ComfyUI does not say.
        self.size_bytes = response.content_length or 0

    def pieces(self) -> AsyncIterator[bytes]:
        """The bytes as they come. Raises what aiohttp raises."""
        return self._response.content.iter_any()


def _is(row: list[Any], prompt_id: str, client_id: str) -> bool:
    if len(row) < 4 or row[1] == prompt_id:
        return len(row) > 1 and row[1] == prompt_id
    # Very old versions make ids of their own.
    return bool(client_id) and isinstance(row[3], dict) and row[3].get("client_id") == client_id
