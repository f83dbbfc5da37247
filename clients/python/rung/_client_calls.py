"""One connection to a control plane, and what calls on it have in common.

Every failure leaves here as a `RungError`; gRPC's own never does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc
import grpc.aio

from rung import v1
from rung.errors import DrainingError, JobCancelledError, RungError, UnavailableError
from rung.transport import DETAILS_TRAILER, ChannelOptions, Peer, error_from_rpc, open_channel

if TYPE_CHECKING:
    # Generic in the stubs only.
    AnyCall: TypeAlias = grpc.aio.UnaryStreamCall[Any, Any]

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0

Q = TypeVar("Q")
R = TypeVar("R")


class Stubs:
    """The services of a control plane on one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.inference = v1.InferenceServiceStub(channel)
        self.fleet = v1.FleetServiceStub(channel)
        self.vram = v1.VramServiceStub(channel)


class Connection:
    """A channel that opens with its first call, in the event loop of that call.

    Args:
        options: where to.
        timeout_s: deadline of unary calls that give none of their own.
        reconnect_s: longest time without a connection before a watch gives up.
    """

    def __init__(self, options: ChannelOptions, *, timeout_s: float, reconnect_s: float) -> None:
        self.options = options
        self.reconnect_s = reconnect_s
        self._timeout_s = timeout_s
        self._metadata = options.metadata()
        self._peer = Peer(
            name="the control plane", address=options.address, start="is it running? (`rung serve`)"
        )
        self._stubs: Stubs | None = None
        self._closed = False

    @property
    def stubs(self) -> Stubs:
        """The services. Raises JobCancelledError once the connection was closed."""
        if self._closed:
            raise JobCancelledError("this client is closed")
        if self._stubs is None:
            self._stubs = Stubs(open_channel(self.options))
        return self._stubs

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        request: Q,
        *,
        timeout_s: float | None = None,
    ) -> R:
        """One call. Raises a `RungError` of the server's choice, or the general one of gRPC's code."""
        try:
            return await method(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as failure:
            raise _error(failure, self._peer) from failure
        except asyncio.CancelledError:
            raise_unless_own_task()
            raise

    async def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Q, R],
        request: Q,
        *,
        on_call: Callable[[AnyCall], None] | None = None,
    ) -> AsyncGenerator[R, None]:
        """The messages of a streaming call; closing the generator cancels the call.

        Args:
            method: of one of the stubs.
            request: to send.
            on_call: gets the call when it was made, for who wants to cancel it from another task.

        Raises:
            UnavailableError: the connection could not be made, or broke.
            JobCancelledError: the call was cancelled here, by closing the stream or the client.
            RungError: what else the server says.
        """
        call = method(request, metadata=self._metadata)
        if on_call is not None:
            on_call(call)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as failure:
            raise _error(failure, self._peer) from failure
        except asyncio.CancelledError:
            raise_unless_own_task()
            raise
        finally:
            call.cancel()

    async def aclose(self) -> None:
        """Close the channel; calls that run end with JobCancelledError."""
        self._closed = True
        if self._stubs is not None:
            await self._stubs.channel.close()


class Reconnect:
    """Decides whether a watch that lost its connection tries again, and when.

    A watch whose first attempt fails does not: the caller learns at once that nobody answers.
    """

    def __init__(self, budget_s: float, *, was_connected: bool = False) -> None:
        self._budget_s = budget_s
        self._was_connected = was_connected
        self._attempts = 0
        self._lost_at_s: float | None = None

    def connected(self) -> None:
        """A message arrived."""
        self._was_connected = True
        self._attempts = 0
        self._lost_at_s = None

    async def pause(self, lost: UnavailableError) -> None:
        """Wait before the next attempt. Raises `lost` when there is to be none."""
        now_s = asyncio.get_running_loop().time()
        if self._lost_at_s is None:
            self._lost_at_s = now_s
        # Subclasses but for draining are the server's word about a node or an engine, not about
        # our connection.
        ours = type(lost) in (UnavailableError, DrainingError)
        if not ours or not self._was_connected or now_s - self._lost_at_s >= self._budget_s:
            raise lost
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._attempts)
        self._attempts += 1
        await asyncio.sleep(random.uniform(longest_s / 2, longest_s))  # noqa: S311 - jitter, no secret


def raise_unless_own_task() -> None:
    """Tell who was cancelled, after a CancelledError: the task that waits, or only its call.

    Raises:
        JobCancelledError: only the call.
    """
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        raise JobCancelledError("the call was cancelled by this client") from None


def _error(failure: grpc.aio.AioRpcError, peer: Peer) -> RungError:
    if failure.code() is grpc.StatusCode.CANCELLED and not any(
        key == DETAILS_TRAILER for key, _ in failure.trailing_metadata() or ()
    ):
        # Nobody here cancelled: that would be asyncio's CancelledError. A server that stops does.
        return UnavailableError("the server ended the call")
    return error_from_rpc(failure, peer)
