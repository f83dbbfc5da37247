"""What every gRPC call of our servers goes through: one access log line, metrics, and errors.

One interceptor does all three, since each layer of grpc.aio costs a coroutine a message.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
import grpc.aio
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from rung.errors import RungError, Status
from rung.transport import grpc_code, status_trailer

_log = structlog.get_logger("rung.grpc")

if TYPE_CHECKING:
    # Generic in the stubs only.
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]


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

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handler of a call. Raising here would reach the caller as UNKNOWN, so it never does."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        if handler.response_streaming:
            inner_stream = handler.unary_stream or handler.stream_stream

            async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
                started = time.monotonic()
                code = Status.CANCELLED.value
                try:
                    async for response in inner_stream(request, context):
                        yield response
                    code = "OK"
                except Exception as error:
                    code = await self._abort(error, method, context)
                finally:
                    self._record(method, code, started)

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)

        inner_unary = handler.unary_unary or handler.stream_unary

        async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            started = time.monotonic()
            code = Status.CANCELLED.value
            try:
                response = await inner_unary(request, context)
                code = "OK"
            except Exception as error:
                code = await self._abort(error, method, context)
            finally:
                self._record(method, code, started)
            return response

        make_unary = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make_unary(unary, handler.request_deserializer, handler.response_serializer)

    async def _abort(
        self, error: Exception, method: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
            raise error
        if not isinstance(error, RungError) or error.status is Status.INTERNAL:
            _log.error("call_failed", method=method, exc_info=error)
            error = RungError("internal error; the server's log has the details")
        context.set_trailing_metadata(status_trailer(error))
        await context.abort(grpc_code(error), error.message, status_trailer(error))

    def _record(self, method: str, code: str, started: float) -> None:
        seconds = time.monotonic() - started
        self._calls.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)
        _log.debug("call", method=method, code=code, seconds=round(seconds, 4))
