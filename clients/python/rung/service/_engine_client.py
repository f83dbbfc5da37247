"""HTTP to an engine on the data path, for the gateway and for the agent alike.

aiohttp and not httpx: a relay through httpx carries a third of the requests at one connection, and
a twelfth at sixteen. Bytes pass through as they come.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType

import aiohttp

from rung.errors import EngineProtocolError, EngineTimeoutError, EngineUnreachableError

#: Time to connect to an engine; it is on this machine or on the LAN.
CONNECT_TIMEOUT_S = 5.0
#: Idle connections are dropped before the engines' usual 5 s (uvicorn) can race a new request.
_KEEPALIVE_S = 4.0
#: Most connections to all engines together; slots bound the use of each.
_MAX_CONNECTIONS = 4096
#: Pieces of a stream are passed on at this size at most.
_READ_BUFFER_BYTES = 256 * 1024


class EngineReply:
    """An engine's answer: its head at once, its body as it comes.

    Close it always; closing before the end aborts the connection, which is how an engine learns
    that nobody listens any more.
    """

    __slots__ = ("_response", "_what", "content_type", "retry_after", "status")

    def __init__(self, response: aiohttp.ClientResponse, what: str) -> None:
        self._response = response
        self._what = what
        self.status = response.status
        headers = response.headers
        self.content_type = headers.get("Content-Type", "application/json")
        self.retry_after = headers.get("Retry-After", "")

    async def read(self) -> bytes:
        """The whole body. Raises as `chunks`."""
        try:
            return await self._response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _broken(error, self._what) from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, piece by piece, as the engine sends it.

        Raises:
            EngineTimeoutError: nothing came for the idle timeout.
            EngineProtocolError: the connection broke in mid-body.
        """
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _broken(error, self._what) from error

    async def aclose(self) -> None:
        """Give the connection back if the body was read to its end, else abort it."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()

    async def __aenter__(self) -> EngineReply:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class EngineClient:
    """A pool of keep-alive connections to engines. Make it inside the running event loop."""

    def __init__(self) -> None:
        connector = aiohttp.TCPConnector(
            limit=_MAX_CONNECTIONS, limit_per_host=0, keepalive_timeout=_KEEPALIVE_S, use_dns_cache=True
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=_READ_BUFFER_BYTES,
            headers={"User-Agent": "rung", "Accept-Encoding": "identity"},
            # An engine never sends a generation elsewhere, and a proxy has no business here.
            trust_env=False,
        )

    async def post(
        self, url: str, body: bytes, *, what: str, idle_timeout_s: float, api_key: str = ""
    ) -> EngineReply:
        """Send a JSON body and return once the head of the answer is there.

        Args:
            url: engine endpoint; never made from what a client sends.
            body: JSON.
            what: name of the engine, for messages.
            idle_timeout_s: longest silence, for the head and between pieces of the body.
            api_key: bearer token of the engine; empty for none.

        Raises:
            EngineUnreachableError: no connection, or it broke before an answer.
            EngineTimeoutError: no head within the idle timeout.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=idle_timeout_s)
        return await self._send("POST", url, body, what=what, timeout=timeout, api_key=api_key)

    async def get(self, url: str, *, what: str, timeout_s: float, api_key: str = "") -> EngineReply:
        """Ask the engine something small; `timeout_s` bounds all of it, the body too. Raises as `post`."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=timeout_s, sock_read=timeout_s)
        return await self._send("GET", url, None, what=what, timeout=timeout, api_key=api_key)

    async def _send(
        self,
        method: str,
        url: str,
        body: bytes | None,
        *,
        what: str,
        timeout: aiohttp.ClientTimeout,
        api_key: str,
    ) -> EngineReply:
        headers = {} if body is None else {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            response = await self._session.request(
                method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            )
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise EngineUnreachableError(
                    f"{what} does not accept connections at {url}", engine=what
                ) from error
            raise EngineTimeoutError(
                f"{what} did not answer for {timeout.sock_read:g} s", engine=what
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachableError(f"{what} cannot be reached: {error}", engine=what) from error
        return EngineReply(response, what)

    async def aclose(self) -> None:
        """Drop all connections."""
        await self._session.close()


def _broken(error: Exception, what: str) -> EngineTimeoutError | EngineProtocolError:
    if isinstance(error, TimeoutError):
        return EngineTimeoutError(f"{what} stopped sending in mid-answer", engine=what)
    return EngineProtocolError(f"the connection to {what} broke in mid-answer: {error}", engine=what)
