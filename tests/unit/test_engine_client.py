"""HTTP to engines: whatever an engine sends, and however it ends, its caller gets the truth of it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rung.errors import EngineProtocolError, EngineTimeoutError, EngineUnreachableError
from rung.service import EngineClient

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


@dataclass
class ScriptedEngine:
    """A listener that sends what a test tells it, one script a connection."""

    script: Script
    port: int = 0
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[object]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self.script(reader, writer)
        finally:
            self.gone.set()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            self.tasks.discard(task)

    async def request(self, reader: asyncio.StreamReader) -> None:
        """Read one request whole."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.requests.append(head + await reader.readexactly(length))


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedEngine]:
    async def unset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("the test has set no script")

    made = ScriptedEngine(unset)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient()
    yield made
    await made.aclose()


def answers(engine: ScriptedEngine, *pieces: bytes, then_waits: bool = True) -> None:
    """Each request gets these pieces, each sent by itself."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await engine.request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                # Lets the client's side of this loop see the piece before the next.
                await asyncio.sleep(0)
            if not then_waits:
                return

    engine.script = script


async def ask(client: EngineClient, engine: ScriptedEngine, idle_timeout_s: float = 5.0) -> bytes:
    async with await client.post(engine.url, b"{}", what="chat-1", idle_timeout_s=idle_timeout_s) as reply:
        return await reply.read()


async def test_a_request_is_whole_and_its_answer_too(client: EngineClient, engine: ScriptedEngine) -> None:
    answers(engine, OK + b"Retry-After: 7\r\nContent-Length: 5\r\n\r\nhello")

    async with await client.post(
        engine.url, b'{"a": 1}', what="chat-1", idle_timeout_s=5, api_key="secret"
    ) as reply:
        assert (reply.status, reply.content_type, reply.retry_after) == (200, "text/plain", "7")
        assert await reply.read() == b"hello"

    head, _, body = engine.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
    assert f"Host: 127.0.0.1:{engine.port}" in lines
    assert "Authorization: Bearer secret" in lines
    assert "Accept-Encoding: identity" in lines
    assert body == b'{"a": 1}'


async def test_further_headers_go_out_and_those_of_limits_come_back(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    limits = b"X-RateLimit-Remaining-Tokens: 0\r\nretry-after-ms: 250\r\nServer: x\r\n"
    answers(engine, OK + limits + b"Content-Length: 0\r\n\r\n", OK + b"Content-Length: 0\r\n\r\n")

    found = []
    for key in ("one", "two"):
        async with await client.post(
            engine.url, b"{}", what="chat-1", idle_timeout_s=5, headers=(("x-api-key", key),)
        ) as reply:
            found.append(dict(reply.limits))

    assert found[0] == {"x-ratelimit-remaining-tokens": "0", "retry-after-ms": "250"}
    assert [b"x-api-key: one" in engine.requests[0], b"x-api-key: two" in engine.requests[1]] == [True, True]
    assert b"Authorization" not in engine.requests[0]


async def test_a_header_cannot_bring_another_one(client: EngineClient, engine: ScriptedEngine) -> None:
    with pytest.raises(EngineUnreachableError) as raised:
        await client.post(
            engine.url, b"{}", what="chat-1", idle_timeout_s=5, headers=(("x-api-key", "a\r\nb: c"),)
        )

    assert "a\r\n" not in raised.value.message


TLS = Path(__file__).parent.parent / "data" / "tls"


@pytest.fixture
async def tls_port() -> AsyncIterator[int]:
    """A listener that says OK over TLS, with a certificate for localhost that no authority has signed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"Content-Length: 2\r\n\r\nOK")
            await writer.drain()
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "localhost.pem", TLS / "localhost.key")
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_a_certificate_that_nobody_vouches_for_is_refused(client: EngineClient, tls_port: int) -> None:
    with pytest.raises(EngineUnreachableError, match="certificate"):
        await client.post(f"https://localhost:{tls_port}/", b"{}", what="cloud", idle_timeout_s=5)


async def test_a_certificate_is_good_for_its_own_name_only(tls_port: int) -> None:
    client = EngineClient(ssl.create_default_context(cafile=TLS / "localhost.pem"))
    async with await client.post(
        f"https://localhost:{tls_port}/", b"{}", what="cloud", idle_timeout_s=5
    ) as reply:
        assert await reply.read() == b"OK"

    with pytest.raises(EngineUnreachableError, match="certificate"):
        await client.post(f"https://127.0.0.1:{tls_port}/", b"{}", what="cloud", idle_timeout_s=5)
    await client.aclose()


async def test_what_came_with_the_head_can_be_taken_at_once(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    more = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await engine.request(reader)
        writer.write(OK + b"Content-Length: 9\r\n\r\nhead")
        await more.wait()
        writer.write(b" rest")

    engine.script = script
    async with await client.post(engine.url, b"", what="chat-1", idle_timeout_s=5) as reply:
        assert reply.ready() == b"head"
        assert reply.ready() == b""
        more.set()
        assert await reply.read() == b" rest"


async def test_a_get_has_its_query_and_no_body(client: EngineClient, engine: ScriptedEngine) -> None:
    answers(engine, OK + b"Content-Length: 2\r\n\r\nok")

    async with await client.get(f"{engine.url}?level=1", what="chat-1", timeout_s=5) as reply:
        assert await reply.read() == b"ok"

    assert engine.requests[0].startswith(b"GET /v1/chat/completions?level=1 HTTP/1.1\r\n")
    assert b"ontent-" not in engine.requests[0]


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 11\r\n\r\nhello world",
        OK + b"Transfer-Encoding: chunked\r\n\r\n6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 11\r\n\r\nhello world",
    ],
)
async def test_an_answer_may_come_in_any_pieces(engine: ScriptedEngine, answer: bytes) -> None:
    for size in (1, 2, 3, 7, len(answer)):
        answers(engine, *(answer[start : start + size] for start in range(0, len(answer), size)))
        client = EngineClient()
        assert await ask(client, engine) == b"hello world"
        await client.aclose()


async def test_a_connection_is_kept_for_the_next_request(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    answers(engine, OK + b"Content-Length: 2\r\n\r\nok")

    assert [await ask(client, engine) for _ in range(3)] == [b"ok"] * 3
    assert engine.connections == 1


@pytest.mark.parametrize(
    ("answer", "then_waits"),
    [
        # The engine says that it closes; it does close; it closed without a word; it has more to say.
        (OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", False),
        (OK + b"\r\nok", False),
        (OK + b"Content-Length: 2\r\n\r\nok", False),
        (OK + b"Content-Length: 2\r\n\r\nok" + OK + b"Content-Length: 3\r\n\r\nbad", True),
        (OK + b"Content-Length: 2\r\n\r\nokbad", True),
    ],
)
async def test_a_connection_that_is_no_good_is_not_used_again(
    client: EngineClient, engine: ScriptedEngine, answer: bytes, then_waits: bool
) -> None:
    answers(engine, answer, then_waits=then_waits)
    for _ in range(2):
        assert await ask(client, engine) == b"ok"
        await engine.gone.wait()
        engine.gone.clear()

    assert engine.connections == 2


async def test_a_word_out_of_turn_ends_an_idle_connection(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    speak = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await engine.request(reader)
        writer.write(OK + b"Content-Length: 2\r\n\r\nok")
        await speak.wait()
        writer.write(OK + b"Content-Length: 3\r\n\r\nbad")
        await reader.read()

    engine.script = script
    assert await ask(client, engine) == b"ok"
    speak.set()
    await engine.gone.wait()

    assert await ask(client, engine) == b"ok"
    assert engine.connections == 2


async def test_nobody_there_is_said(client: EngineClient, unused_tcp_port: int) -> None:
    with pytest.raises(EngineUnreachableError, match="chat-1 cannot be reached"):
        await client.post(f"http://127.0.0.1:{unused_tcp_port}/", b"", what="chat-1", idle_timeout_s=1)


@pytest.mark.parametrize("url", ["http://", "nonsense", "http://h/x\r\nInjected: 1"])
async def test_what_is_no_url_of_an_engine_is_not_asked(client: EngineClient, url: str) -> None:
    with pytest.raises(EngineUnreachableError):
        await client.post(url, b"", what="chat-1", idle_timeout_s=1)


async def test_an_engine_that_hangs_up_without_an_answer_was_not_reached(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    answers(engine, then_waits=False)

    with pytest.raises(EngineUnreachableError, match="it was closed"):
        await ask(client, engine)


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", b"\x00" * 90],
)
async def test_what_is_not_http_is_said(client: EngineClient, engine: ScriptedEngine, answer: bytes) -> None:
    answers(engine, answer)

    with pytest.raises(EngineProtocolError, match="not HTTP"):
        await ask(client, engine)


async def test_headers_without_end_are_not_collected(client: EngineClient, engine: ScriptedEngine) -> None:
    answers(engine, OK, *(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(80)))

    with pytest.raises(EngineProtocolError, match="headers without end"):
        await ask(client, engine)


@pytest.mark.parametrize(
    "answer",
    [OK + b"Content-Length: 9\r\n\r\nhalf", OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\nhalf"],
)
async def test_a_body_that_is_cut_is_not_taken_for_whole(
    client: EngineClient, engine: ScriptedEngine, answer: bytes
) -> None:
    answers(engine, answer, then_waits=False)
    got: list[bytes] = []

    async def read() -> None:
        async with await client.post(engine.url, b"", what="chat-1", idle_timeout_s=5) as reply:
            async for chunk in reply.chunks():
                got.append(chunk)

    with pytest.raises(EngineProtocolError, match="broke in mid-answer"):
        await read()
    assert got == [b"half"]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [(b"", "did not answer for 0.05 s"), (OK + b"Content-Length: 9\r\n\r\nhalf", "stopped sending")],
)
async def test_silence_ends_an_exchange(
    client: EngineClient, engine: ScriptedEngine, answer: bytes, complaint: str
) -> None:
    answers(engine, answer)

    with pytest.raises(EngineTimeoutError, match=complaint):
        await ask(client, engine, idle_timeout_s=0.05)
    await engine.gone.wait()


async def test_a_get_is_bounded_as_a_whole(client: EngineClient, engine: ScriptedEngine) -> None:
    async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await engine.request(reader)
        writer.write(OK + b"Content-Length: 1000000\r\n\r\n")
        while not reader.at_eof():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.001)

    engine.script = drips

    with pytest.raises(EngineTimeoutError):
        async with await client.get(engine.url, what="chat-1", timeout_s=0.1) as reply:
            await reply.read()


async def test_a_slow_reader_slows_the_engine_and_is_no_silence(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    body = b"x" * 20_000_000
    sent: list[int] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await engine.request(reader)
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 100_000):
            writer.write(body[start : start + 100_000])
            await writer.drain()
            sent.append(start)

    engine.script = script
    async with await client.post(engine.url, b"", what="chat-1", idle_timeout_s=0.05) as reply:
        chunks = reply.chunks()
        got = len(await anext(chunks))
        await asyncio.sleep(0.2)  # longer than the idle timeout: the reader's own doing
        assert len(sent) < 190
        async for chunk in chunks:
            got += len(chunk)

    assert got == len(body)


async def test_pieces_are_collected_for_an_interval_and_the_end_is_not_held_back(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    first, rest = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await engine.request(reader)
        writer.write(OK + b"Content-Length: 6\r\n\r\na")
        await first.wait()
        for letter in b"bcde":
            writer.write(bytes([letter]))
            await writer.drain()
            await asyncio.sleep(0)
        await rest.wait()
        writer.write(b"f")

    engine.script = script
    async with await client.post(engine.url, b"", what="chat-1", idle_timeout_s=5) as reply:
        intervals_s = iter([0.1, 600.0])
        chunks = reply.chunks(lambda: next(intervals_s))
        assert await anext(chunks) == b"a"
        first.set()
        assert await anext(chunks) == b"bcde"
        rest.set()
        async with asyncio.timeout(5):
            assert await anext(chunks) == b"f"


async def test_leaving_before_the_end_aborts_the_engines_work(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    answers(engine, OK + b"Content-Length: 9\r\n\r\nhalf")
    async with await client.post(engine.url, b"", what="chat-1", idle_timeout_s=5) as reply:
        assert await anext(reply.chunks()) == b"half"

    await engine.gone.wait()
    assert await asyncio.wait_for(engine.gone.wait(), 5)


async def test_a_caller_that_is_cancelled_leaves_no_connection(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    asked = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await engine.request(reader)
        asked.set()
        await reader.read()

    engine.script = script
    task = asyncio.create_task(ask(client, engine))
    await asked.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(engine.gone.wait(), 5)
