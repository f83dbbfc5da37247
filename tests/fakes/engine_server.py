"""An engine with OpenAI's routes that does what a test tells it, on a port of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from aiohttp import web

Answer = Callable[[web.Request, dict[str, object]], Awaitable[web.StreamResponse]]


def frame(**fields: object) -> bytes:
    """A server-sent event with these fields."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(text: str = "", finish: str | None = None) -> bytes:
    """A chunk of an answer."""
    return frame(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


USAGE = frame(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7})
DONE = b"data: [DONE]\n\n"


class EngineServer:
    """Answers chat with `answer`; counts requests, and those that were broken off."""

    def __init__(self) -> None:
        self.answer: Answer = self.tell
        #: What `/predict` answers, and with which status.
        self.predictions: dict[str, object] = {}
        self.predict_status = 200
        self.bodies: list[dict[str, object]] = []
        self.broken_off = asyncio.Event()
        self.release = asyncio.Event()
        self.started = asyncio.Event()
        self.url = ""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_post("/predict", self._predict)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)

    async def __aenter__(self) -> EngineServer:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release.set()
        await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        try:
            return await self.answer(request, body)
        except asyncio.CancelledError:
            self.broken_off.set()
            raise

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        rows = [{"object": "embedding", "index": i, "embedding": [float(i), 0.5]} for i in range(len(inputs))]
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        return web.json_response({"object": "list", "data": rows, "model": body["model"], "usage": usage})

    async def _predict(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.started.set()
        if not self.predictions:
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.broken_off.set()
                raise
        return web.json_response(self.predictions, status=self.predict_status)

    async def tell(self, request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        """Say "Hello world"."""
        if not body.get("stream"):
            message = {"role": "assistant", "content": "Hello world"}
            return web.json_response(
                {
                    "id": "chatcmpl-1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
                }
            )
        return await self.pieces(request, delta("Hello"), delta(" world", "stop"), USAGE, DONE)

    async def endless(self, request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        """Begin to answer, and go on until it is released."""
        response = await self.head(request)
        await response.write(delta("Hello"))
        self.started.set()
        await self.release.wait()
        return response

    async def head(self, request: web.Request) -> web.StreamResponse:
        """The head of a stream."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        return response

    async def pieces(self, request: web.Request, *pieces: bytes) -> web.StreamResponse:
        """A stream of these pieces."""
        response = await self.head(request)
        for piece in pieces:
            await response.write(piece)
        await response.write_eof()
        return response
