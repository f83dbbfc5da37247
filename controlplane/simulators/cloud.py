"""A cloud model API that costs nothing: OpenAI's dialect or Anthropic's, on a port of loopback.

    python -m controlplane.simulators.cloud --dialect anthropic --port 8301 --api-key sk-simulated

It answers by rote, refuses what the real one would refuse, and misbehaves on request: for all requests with
`--fault` or `POST /sim/faults {"faults": [...]}`, for one with the header `x-sim-fault`. `GET /sim/state`
tells what it was asked.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

from controlplane.simulators._answers import Answer
from controlplane.simulators._anthropic import AnthropicDialect
from controlplane.simulators._faults import (
    FRAMES_BEFORE_FAULT,
    CloudFault,
    Refusal,
    error_body,
    parse_faults,
    refusal_of,
)
from controlplane.simulators._images import check_images, images_answer, moderated
from controlplane.simulators._openai import OpenAiDialect

_MAX_BODY_BYTES = 64 * 1024 * 1024
_KEEP_ALIVES = 3


class CloudDialect(Protocol):
    """Where the simulated APIs differ."""

    path: str
    anthropic: bool

    def key_of(self, headers: Any) -> str:
        """The key in a request."""
        ...

    def check(self, fields: dict[str, Any], headers: Any) -> Refusal | None:
        """What is wrong with a request."""
        ...

    def answer(self, fields: dict[str, Any], body_bytes: int) -> Answer:
        """What to say."""
        ...

    def frames(self, fields: dict[str, Any], answer: Answer) -> Any:
        """The answer as a stream."""
        ...

    def error_frame(self) -> bytes:
        """A failure in mid-stream."""
        ...

    def whole(self, fields: dict[str, Any], answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        ...


class CloudSimulator:
    """Serves one dialect.

    Args:
        dialect: how it speaks.
        api_key: the key that it wants; empty for any.
        faults: what it does wrong with all requests.
        tokens_per_s: how fast it speaks; 0 for as fast as it can.
        slow_first_byte_s: how long `slow_first_byte` waits.
    """

    def __init__(
        self,
        dialect: CloudDialect,
        *,
        api_key: str,
        faults: frozenset[CloudFault],
        tokens_per_s: float,
        slow_first_byte_s: float,
    ) -> None:
        self._dialect = dialect
        self._api_key = api_key
        self._faults = faults
        self._pause_s = 1.0 / tokens_per_s if tokens_per_s > 0 else 0.0
        self._slow_first_byte_s = slow_first_byte_s
        self._counters = {"requests": 0, "completed": 0, "aborted": 0}
        self._last_request: dict[str, Any] = {}

    def application(self) -> web.Application:
        """Its routes."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_post(self._dialect.path, self._generate)
        app.router.add_post(f"/v1{self._dialect.path}", self._generate)
        if not self._dialect.anthropic:
            for path in ("/images/generations", "/images/edits"):
                app.router.add_post(path, self._draw)
                app.router.add_post(f"/v1{path}", self._draw)
        app.router.add_get("/sim/state", self._state)
        app.router.add_post("/sim/faults", self._switch_faults)
        return app

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        return await self._counted(self._answer(http))

    async def _draw(self, http: web.Request) -> web.StreamResponse:
        return await self._counted(self._pictures(http))

    async def _counted(self, answer: Awaitable[web.StreamResponse]) -> web.StreamResponse:
        self._counters["requests"] += 1
        try:
            response = await answer
        except (asyncio.CancelledError, ConnectionError):
            self._counters["aborted"] += 1
            raise
        self._counters["completed"] += 1
        return response

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        dialect = self._dialect
        key = dialect.key_of(http.headers)
        try:
            faults = self._faults | parse_faults(http.headers.get("x-sim-fault", "").split(","))
            fields = msgspec.json.decode(body := await http.read(), type=dict[str, Any])
        except ValueError as error:
            return _refuse(Refusal(400, error_body(dialect.anthropic, "invalid_request_error", str(error))))
        self._last_request = fields
        if self._api_key and key != self._api_key:
            faults |= {CloudFault.WRONG_KEY}
        refused = refusal_of(faults, anthropic=dialect.anthropic, key=key)
        refused = refused or dialect.check(fields, http.headers)
        if refused is not None:
            return _refuse(refused)
        if CloudFault.HANG in faults:
            await asyncio.Event().wait()
        if CloudFault.SLOW_FIRST_BYTE in faults:
            await asyncio.sleep(self._slow_first_byte_s)
        answer = dialect.answer(fields, len(body))
        if fields.get("stream") and CloudFault.NOT_A_STREAM not in faults:
            return await self._stream(http, fields, answer, faults)
        return await self._whole(http, fields, answer, faults)

    async def _pictures(self, http: web.Request) -> web.StreamResponse:
        fields: dict[str, Any] = {}
        if http.content_type == "multipart/form-data":
            for name, value in (await http.post()).items():
                fields[name] = (
                    f"{value.filename}: {value.content_type}" if isinstance(value, web.FileField) else value
                )
        else:
            fields = msgspec.json.decode(await http.read(), type=dict[str, Any])
        self._last_request = fields
        faults = self._faults
        key = self._dialect.key_of(http.headers)
        if self._api_key and key != self._api_key:
            faults |= {CloudFault.WRONG_KEY}
        refused = refusal_of(faults, anthropic=False, key=key) or check_images(fields)
        if refused is None and CloudFault.MODERATION in faults:
            refused = moderated()
        if refused is not None:
            return _refuse(refused)
        if CloudFault.HANG in faults:
            await asyncio.Event().wait()
        if CloudFault.SLOW_FIRST_BYTE in faults:
            await asyncio.sleep(self._slow_first_byte_s)
        whole = msgspec.json.encode(images_answer(fields, faults))
        if CloudFault.MALFORMED in faults:
            whole = whole[: len(whole) // 2]
        return web.Response(body=whole, content_type="application/json")

    async def _whole(
        self, http: web.Request, fields: dict[str, Any], answer: Answer, faults: frozenset[CloudFault]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(http)
        if CloudFault.KEEP_ALIVE in faults:
            for _ in range(_KEEP_ALIVES):
                await response.write(b"\n")
        await asyncio.sleep(self._pause_s * answer.completion_tokens)
        whole = msgspec.json.encode(self._dialect.whole(fields, answer))
        if CloudFault.MALFORMED in faults:
            whole = whole[: len(whole) // 2]
        elif CloudFault.CUT_MID_STREAM in faults:
            await response.write(whole[: len(whole) // 2])
            _cut(http)
        await response.write(whole)
        await response.write_eof()
        return response

    async def _stream(
        self, http: web.Request, fields: dict[str, Any], answer: Answer, faults: frozenset[CloudFault]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(http)
        for place, frame in enumerate(self._dialect.frames(fields, answer)):
            if CloudFault.KEEP_ALIVE in faults and place < _KEEP_ALIVES:
                await response.write(b": keep-alive\n\n\n")
            if place == FRAMES_BEFORE_FAULT and await self._break(http, response, frame, faults):
                return response
            await response.write(frame)
            await asyncio.sleep(self._pause_s)
        await response.write_eof()
        return response

    async def _break(
        self, http: web.Request, response: web.StreamResponse, frame: bytes, faults: frozenset[CloudFault]
    ) -> bool:
        """Do what the faults of mid-stream demand; True if that was the end."""
        if CloudFault.CUT_MID_STREAM in faults:
            await response.write(frame[: len(frame) // 2])
            _cut(http)
        if CloudFault.MALFORMED in faults:
            await response.write(frame[: len(frame) // 2] + b"\n\n")
        elif CloudFault.ERROR_MID_STREAM in faults:
            await response.write(self._dialect.error_frame())
        elif CloudFault.ENDED_MID_STREAM not in faults:
            return False
        await response.write_eof()
        return True

    async def _state(self, http: web.Request) -> web.Response:
        state = {**self._counters, "faults": sorted(self._faults), "last_request": self._last_request}
        return _json({"simulated": True, **state})

    async def _switch_faults(self, http: web.Request) -> web.Response:
        try:
            wanted = msgspec.json.decode(await http.read(), type=dict[str, list[str]])
            self._faults = parse_faults(wanted.get("faults", []))
        except ValueError as error:
            return _json({"error": str(error)}, status=400)
        return _json({"faults": sorted(self._faults)})


def _cut(http: web.Request) -> None:
    if http.transport is not None:
        http.transport.abort()
    raise ConnectionResetError("simulated fault: cut in mid-stream")


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def _refuse(refusal: Refusal) -> web.Response:
    response = _json(refusal.body, status=refusal.status)
    response.headers.update(refusal.headers)
    return response


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dialect", choices=("openai", "anthropic"), default="openai")
    parser.add_argument("--provider", default="openai", help="who to be: openai, deepseek, google or a name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one, which is printed")
    parser.add_argument("--api-key", default="", help="the key to want; any if it is left out")
    parser.add_argument("--fault", action="append", default=[], help="may be repeated")
    parser.add_argument("--tokens-per-s", type=float, default=200.0, help="0 for as fast as it can")
    parser.add_argument("--slow-first-byte-s", type=float, default=5.0)
    return parser


async def _serve(options: argparse.Namespace) -> int:
    dialect = AnthropicDialect() if options.dialect == "anthropic" else OpenAiDialect(options.provider)
    simulator = CloudSimulator(
        dialect,
        api_key=options.api_key,
        faults=parse_faults(options.fault),
        tokens_per_s=options.tokens_per_s,
        slow_first_byte_s=options.slow_first_byte_s,
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        simulator.application(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, options.host, options.port).start()
        sys.stdout.write(f"listening on http://{options.host}:{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        await stop.wait()
    finally:
        await runner.cleanup()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated API; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return asyncio.run(_serve(options))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
