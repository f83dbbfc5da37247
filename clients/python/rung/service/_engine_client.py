"""HTTP to an engine on the data path, for the gateway and for the agent alike.

Bytes pass through as they come.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TypeAlias
from urllib.parse import urlsplit

from msgspec import Struct

from rung.errors import EngineUnreachableError
from rung.service._http_connection import HttpConnection

#: Time to connect to an engine; it is on this machine or on the LAN.
CONNECT_TIMEOUT_S = 5.0
#: Idle connections are dropped before the engines' usual 5 s (uvicorn) can race a new request.
_KEEPALIVE_S = 4.0
#: Headers of a request beside those that all have.
Headers: TypeAlias = tuple[tuple[str, str], ...]
#: Engine URLs and keys are few, and configured; what is remembered of them is bounded all the same.
_REMEMBERED_ROUTES = 1024


class EngineReply:
    """An engine's answer: its head at once, its body as it comes.

    Close it always; closing before the end aborts the connection, which is how an engine learns
    that nobody listens any more.
    """

    __slots__ = ("_connection", "_idle", "content_type", "limits", "retry_after", "status")

    def __init__(self, connection: HttpConnection, idle: list[HttpConnection]) -> None:
        self._connection = connection
        self._idle = idle
        self.status = connection.status
        self.content_type = connection.content_type
        self.retry_after = connection.retry_after
        #: Headers that speak of limits and when they end, by their names in lower case.
        self.limits = connection.limits

    def ready(self) -> bytes:
        """Take what has come of the body already, which is often all of it; `chunks` goes on after it."""
        return self._connection.take_ready()

    async def read(self) -> bytes:
        """The whole body, or what `ready` has left of it. Raises as `chunks`."""
        take = self._connection.take
        pieces = []
        while (data := await take()) is not None:
            pieces.append(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def chunks(self, interval_s: Callable[[], float] | None = None) -> AsyncIterator[bytes]:
        """The body, as the engine sends it; what queues up while it is not read comes in one piece.

        Args:
            interval_s: the least time between two pieces, asked for after each; the end of the body comes
                as soon as it is there.

        Raises:
            EngineTimeoutError: nothing came for the idle timeout.
            EngineProtocolError: the connection broke in mid-body.
        """
        take = self._connection.take
        time_s = asyncio.get_running_loop().time
        not_before_s = 0.0
        while (data := await take(not_before_s)) is not None:
            yield data
            if interval_s is not None:
                not_before_s = time_s() + interval_s()

    async def aclose(self) -> None:
        """Give the connection back if the body was read to its end, else abort it."""
        connection = self._connection
        if connection.finish():
            self._idle.append(connection)

    async def __aenter__(self) -> EngineReply:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _Route(Struct, frozen=True):
    """Where a URL leads, and how a request to it begins."""

    host: str
    port: int
    tls: bool
    request_head: bytes
    idle: list[HttpConnection]


class EngineClient:
    """A pool of keep-alive connections to engines. Make it inside the running event loop.

    It follows no redirect and knows no proxy: an engine never sends a generation elsewhere. Over https it
    demands a certificate that it can verify, for the name in the URL.

    Args:
        tls: what to verify certificates with; by default the authorities that the system trusts.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._tls = tls
        self._idle: dict[tuple[str, int, bool], list[HttpConnection]] = {}
        self._routes: dict[tuple[str, str, str, Headers], _Route] = {}

    async def post(
        self,
        url: str,
        body: bytes,
        *,
        what: str,
        idle_timeout_s: float,
        api_key: str = "",
        headers: Headers = (),
        content_type: str = "application/json",
    ) -> EngineReply:
        """Send a body and return once the head of the answer is there.

        Args:
            url: engine endpoint; never made from what a client sends.
            body: JSON, unless `content_type` says otherwise.
            what: name of the engine, for messages.
            idle_timeout_s: longest silence, for the head and between pieces of the body.
            api_key: bearer token of the engine; empty for none.
            headers: further ones, for those who want them; configured, as the URL is.
            content_type: of the body; the adapter's own, never a caller's.

        Raises:
            EngineUnreachableError: no connection, or it broke before an answer.
            EngineTimeoutError: no head within the idle timeout.
            EngineProtocolError: the answer is not HTTP.
        """
        route = self._routes.get(("POST", url, api_key, headers))
        if route is None:
            route = self._route("POST", url, api_key, headers)
        request = b"%bContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (
            route.request_head,
            content_type.encode("latin-1"),
            len(body),
            body,
        )
        kept = self._kept(route)
        if kept is not None:
            try:
                return await self._exchange(kept, route, request, what, idle_timeout_s)
            except EngineUnreachableError:
                # Engines close what is idle; one that did so while this request was on its way has not
                # begun to answer it.
                if kept.heard:
                    raise
        fresh = await self._connect(route, what, url, CONNECT_TIMEOUT_S)
        return await self._exchange(fresh, route, request, what, idle_timeout_s)

    async def get(self, url: str, *, what: str, timeout_s: float, api_key: str = "") -> EngineReply:
        """Ask the engine something small; `timeout_s` bounds all of it, the body too. Raises as `post`."""
        route = self._routes.get(("GET", url, api_key, ())) or self._route("GET", url, api_key, ())
        return await self._ask(route, url, what=what, timeout_s=timeout_s)

    async def delete(self, url: str, *, what: str, timeout_s: float, api_key: str = "") -> EngineReply:
        """Have the engine let go of something; as `get`."""
        route = self._routes.get(("DELETE", url, api_key, ())) or self._route("DELETE", url, api_key, ())
        return await self._ask(route, url, what=what, timeout_s=timeout_s)

    async def _ask(self, route: _Route, url: str, *, what: str, timeout_s: float) -> EngineReply:
        # Always a new connection: a probe is to find out whether there is somebody who accepts one.
        connection = await self._connect(route, what, url, timeout_s)
        request = route.request_head + b"\r\n"
        return await self._exchange(connection, route, request, what, timeout_s, bounds_all=True)

    async def _exchange(
        self,
        connection: HttpConnection,
        route: _Route,
        request: bytes,
        what: str,
        timeout_s: float,
        *,
        bounds_all: bool = False,
    ) -> EngineReply:
        try:
            connection.send(request, what=what, timeout_s=timeout_s, bounds_all=bounds_all)
            await connection.head()
        except BaseException:
            connection.finish()
            raise
        return EngineReply(connection, route.idle)

    def _kept(self, route: _Route) -> HttpConnection | None:
        """The connection that was used last, if there is one that is not too old."""
        idle = route.idle
        while idle:
            connection = idle.pop()
            if connection.reusable and self._loop.time() - connection.idle_since_s < _KEEPALIVE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self, route: _Route, what: str, url: str, timeout_s: float) -> HttpConnection:
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await self._loop.create_connection(
                    lambda: HttpConnection(self._loop),
                    route.host,
                    route.port,
                    ssl=self._trusted() if route.tls else None,
                )
        except TimeoutError as error:
            raise EngineUnreachableError(
                f"{what} does not accept connections at {url}", engine=what
            ) from error
        except OSError as error:
            raise EngineUnreachableError(f"{what} cannot be reached: {error}", engine=what) from error
        return connection

    def _trusted(self) -> ssl.SSLContext:
        """What verifies certificates; made once, since it reads the authorities' from the disk."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _route(self, method: str, url: str, api_key: str, headers: Headers) -> _Route:
        parts = urlsplit(url)
        host, tls = parts.hostname or "", parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "User-Agent: rung",
            "Accept: */*",
            "Accept-Encoding: identity",
        ]
        if api_key:
            lines.append(f"Authorization: Bearer {api_key}")
        lines += [f"{name}: {value}" for name, value in headers]
        text = "\r\n".join(lines)
        if not host or len(text.splitlines()) != len(lines):
            raise EngineUnreachableError(f"{url!r} is not the URL of an engine", url=url)
        idle = self._idle.setdefault((host, port, tls), [])
        route = _Route(host, port, tls, f"{text}\r\n".encode("latin-1"), idle)
        if len(self._routes) >= _REMEMBERED_ROUTES:
            self._routes.clear()
        self._routes[method, url, api_key, headers] = route
        return route

    async def aclose(self) -> None:
        """Drop all idle connections."""
        for idle in self._idle.values():
            while idle:
                idle.pop().abort()
