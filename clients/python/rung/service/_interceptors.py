"""What every gRPC call of our servers goes through: one access log line, metrics, and errors.

One interceptor does all three, since each layer of grpc.aio costs a coroutine a message.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
import grpc.aio
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from rung.errors import RungError, Status
from rung.service._services import Malformed, make_handler
from rung.transport import grpc_code, status_trailer

_log = structlog.get_logger("rung.grpc")
#: Asked first: a line that is not shown should cost nothing on the path of every call.
_level = logging.getLogger("rung.grpc")

if TYPE_CHECKING:
    # Generic in the stubs only.
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Logs and counts calls, and turns what a servicer raises into a rich gRPC status.

    A `RungError` becomes its own status. Anything else is a defect: it is logged with its trace and
    the caller reads "internal error".
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "rung_grpc_calls", "gRPC calls by method and code", ["method", "code"], registry=registry
        )
        self._seconds = Histogram(
            "rung_grpc_call_seconds", "Duration of gRPC calls", ["method"], registry=registry
        )
        # Methods and codes are few; finding a labelled child, or wrapping a handler, costs more than a call.
        self._children: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of a call. Raising here would reach the caller as UNKNOWN, so it never does."""
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith("/grpc."):
            return handler
        # The stubs of grpc know only its synchronous side.
        inner_stream: Any = handler.stream_stream or handler.unary_stream
        inner_unary: Any = handler.stream_unary or handler.unary_unary

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            started = time.monotonic()
            code = Status.CANCELLED.value
            try:
                if type(request) is Malformed:
                    raise request.error
                async for response in inner_stream(request, context):
                    yield response
                code = "OK"
            except Exception as error:  # noqa: BLE001 - the boundary: whatever it is becomes a status
                refusal = refusal_of(error, method)
                code = refusal.status.value
                await _abort(refusal, context)
            finally:
                self._record(method, code, started)

        async def unary(request: Any, context: Context) -> Any:
            started = time.monotonic()
            code = Status.CANCELLED.value
            try:
                if type(request) is Malformed:
                    raise request.error
                response = await inner_unary(request, context)
                code = "OK"
            except Exception as error:  # noqa: BLE001 - the boundary: whatever it is becomes a status
                refusal = refusal_of(error, method)
                code = refusal.status.value
                await _abort(refusal, context)
            finally:
                self._record(method, code, started)
            return response

        wrapped = make_handler(
            stream if handler.response_streaming else unary,
            streams=(bool(handler.request_streaming), bool(handler.response_streaming)),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        self._wrapped[method] = wrapped
        return wrapped

    def _record(self, method: str, code: str, started: float) -> None:
        seconds = time.monotonic() - started
        children = self._children.get((method, code))
        if children is None:
            children = self._children[method, code] = (
                self._calls.labels(method, code),
                self._seconds.labels(method),
            )
        calls, histogram = children
        calls.inc()
        histogram.observe(seconds)
        if _level.isEnabledFor(logging.DEBUG):
            _log.debug("call", method=method, code=code, seconds=round(seconds, 4))


def refusal_of(error: Exception, method: str) -> RungError:
    """What the caller of `method` is told. A defect is logged with its trace, and its text stays here."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, RungError) and error.status is not Status.INTERNAL:
        return error
    _log.error("call_failed", method=method, exc_info=error)
    return RungError("internal error; the server's log has the details")


async def _abort(error: RungError, context: Context) -> NoReturn:
    await context.abort(grpc_code(error), error.message, status_trailer(error))
