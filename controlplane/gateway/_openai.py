"""OpenAI's routes: chat completions, embeddings, models."""

from __future__ import annotations

import asyncio
import re

import msgspec
from aiohttp import web

from controlplane.gateway._errors import error_body, error_response
from controlplane.gateway._keep_alive import KeepAlive
from controlplane.gateway._progress import progress_comment
from controlplane.pipelines import Begun, Pipelines, Wish, read_head
from rung.errors import InvalidRequestError, RungError, UnknownModelError
from rung.types import JobKind, PhaseProgress, Policy, Priority

#: A caller's own id ends up in headers and logs.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
#: Text that a slow caller has not taken yet is held for it up to this size, so that the engine's slot
#: does not wait for it; beyond, the engine is slowed down.
_WRITE_BUFFER_BYTES = 4 * 1024 * 1024
_DONE = b"data: [DONE]\n\n"


class OpenAiRoutes:
    """Handlers of the OpenAI-compatible part of the gateway."""

    def __init__(self, pipelines: Pipelines) -> None:
        self._pipelines = pipelines

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        body = await request.read()
        head = read_head(body)
        begun = await self._begin(request, JobKind.CHAT, head.model, body)
        if head.stream:
            return await self._stream(request, begun, keep_usage=head.wants_usage)
        return await self._answer(begun)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/embeddings`."""
        body = await request.read()
        head = read_head(body)
        return await self._answer(await self._begin(request, JobKind.EMBEDDING, head.model, body))

    async def models(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/models`."""
        return _json({"object": "list", "data": [_model_row(model) for model in self._pipelines.models()]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/models/{model}`. Raises UnknownModelError."""
        name = request.match_info["model"]
        for found in self._pipelines.models():
            if found.id == name:
                return _json(_model_row(found))
        message = f"there is no model {name!r}; `GET /v1/models` lists what there is"
        raise UnknownModelError(message, model=name)

    async def _begin(self, request: web.Request, kind: JobKind, model: str, body: bytes) -> Begun:
        wish = Wish(
            kind=kind,
            model=model,
            body=body,
            policy=read_policy(request),
            request_id=read_request_id(request),
        )
        begun = self._pipelines.begin(await self._pipelines.prepare(wish))
        task = asyncio.current_task()
        assert task is not None
        begun.job.on_cancel(task.cancel)
        return begun

    async def _answer(self, begun: Begun) -> web.StreamResponse:
        try:
            body = await self._pipelines.answer(begun)
        except RungError as error:
            return error_response(error, job_headers(begun))
        return web.Response(body=body, content_type="application/json", headers=job_headers(begun))

    async def _stream(self, request: web.Request, begun: Begun, *, keep_usage: bool) -> web.StreamResponse:
        """Relay a stream, which is never silent for a second: comments say what is under way.

        The head of the response waits for the engine's answer, so that an error before that has its own
        status, but no longer than `KEEP_ALIVE_S`, nor if the engine has to be waited for by then: what fails
        after the first comment is told by an event. Headers say who answers only where that is certain.
        """
        response = web.StreamResponse()
        opening = asyncio.Lock()
        is_open = False
        now_s = asyncio.get_running_loop().time

        async def open_response(*, answers: bool) -> None:
            nonlocal is_open
            # Both what the engine says and a comment may want to be first.
            async with opening:
                if is_open:
                    return
                response.headers.update(job_headers(begun, answers=answers))
                response.headers["Content-Type"] = "text/event-stream; charset=utf-8"
                response.headers["Cache-Control"] = "no-cache"
                response.headers["X-Accel-Buffering"] = "no"
                if request.transport is not None:
                    request.transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
                await response.prepare(request)
                is_open = True

        async def on_bytes(data: bytes) -> None:
            if not is_open:
                await open_response(answers=True)
            keep_alive.wrote_s = now_s()
            await response.write(data)

        async def say() -> None:
            if request.transport is not None and request.transport.get_write_buffer_size():
                # The caller has yet to take what was written: it is not kept waiting by us.
                return
            if not is_open:
                await open_response(answers=False)
            await response.write(_comment(begun))

        async def on_wait() -> None:
            await say()
            keep_alive.wrote_s = now_s()

        failure: RungError | None = None
        async with KeepAlive(say) as keep_alive:
            try:
                await self._pipelines.stream(begun, on_bytes, keep_usage=keep_usage, on_wait=on_wait)
            except RungError as error:
                failure = error
        if failure is not None:
            if not is_open:
                return error_response(failure, job_headers(begun))
            failure.metadata["delivered_characters"] = str(begun.job.delivered_characters)
            await response.write(b"data: " + error_body(failure) + b"\n\n")
        elif not is_open:
            await open_response(answers=True)
        if request.transport is not None:
            # The end goes at once, and not when the loop has been round: callers go on from it.
            request.transport.set_write_buffer_limits(high=0)
        await response.write_eof(_DONE)
        return response


def _comment(begun: Begun) -> bytes:
    """What is under way now, for whoever reads comments; OpenAI's clients skip them."""
    heartbeat = begun.job.heartbeat()
    assert isinstance(heartbeat.payload, PhaseProgress)
    return progress_comment(heartbeat.payload, heartbeat.elapsed_s)


def read_policy(request: web.Request) -> Policy:
    """Policy from `X-Rung-Local-Only`, `X-Rung-Bridge` and `X-Rung-Priority`. Raises InvalidRequestError."""
    headers = request.headers
    local_only = headers.get("X-Rung-Local-Only")
    bridge = headers.get("X-Rung-Bridge")
    priority = headers.get("X-Rung-Priority")
    if local_only is None and bridge is None and priority is None:
        return _DEFAULT_POLICY
    try:
        parsed = Priority(priority) if priority is not None else Priority.AGENT
    except ValueError:
        raise InvalidRequestError(
            f"X-Rung-Priority is {priority!r}; it must be user, agent or background"
        ) from None
    return Policy(
        local_only=_is_true("X-Rung-Local-Only", local_only),
        bridge_allowed=_is_true("X-Rung-Bridge", bridge),
        priority=parsed,
    )


def _is_true(name: str, value: str | None) -> bool:
    if value not in (None, "true", "false", "1", "0"):
        raise InvalidRequestError(f"{name} is {value!r}; it must be true or false")
    return value in ("true", "1")


_DEFAULT_POLICY = Policy()


def read_request_id(request: web.Request) -> str:
    """The caller's own id from `X-Request-Id`; empty without one. Raises InvalidRequestError."""
    found = request.headers.get("X-Request-Id", "")
    if found and not _REQUEST_ID.fullmatch(found):
        raise InvalidRequestError("X-Request-Id may have 1 to 128 letters, digits and . _ : -")
    return found


def job_headers(begun: Begun, *, answers: bool = True) -> dict[str, str]:
    """Which job it is, where the ladder put it, and, once that is known, who answers.

    Args:
        begun: the job.
        answers: whoever is asked does answer, or failed as the last one; else another one may yet.
    """
    job, route = begun.job, begun.route
    headers = {"X-Rung-Job": job.id}
    if route.rung:
        headers["X-Rung-Effort"] = str(route.effort)
        headers["X-Rung-Rung"] = route.rung
    if job.request_id:
        headers["X-Request-Id"] = job.request_id
    served = job.served
    if answers and served is not None:
        headers["X-Rung-Requested"] = served.requested
        headers["X-Rung-Target"] = served.target
        headers["X-Rung-Node"] = served.node
        headers["X-Rung-Model"] = served.model
    return headers


def _model_row(model: msgspec.Struct) -> dict[str, object]:
    fields = msgspec.to_builtins(model)
    # `owned_by` tells a discovering agent that this is a Rung and not an engine.
    return {"id": fields.pop("id"), "object": "model", "created": 0, "owned_by": "rung", "rung": fields}


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
