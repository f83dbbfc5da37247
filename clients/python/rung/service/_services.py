"""Putting a servicer on a gRPC server, so that what it lacks answers in plain words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from rung.errors import InvalidRequestError, NotImplementedYetError

if TYPE_CHECKING:
    from typing import TypeAlias

    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class Malformed:
    """What stands for the request of a single-request method when its bytes cannot be read.

    gRPC reads a request before it calls the handler, and tells the caller of an error there UNKNOWN and no
    more. `CallInterceptor` raises `error` where it becomes a status.
    """

    __slots__ = ("error",)

    def __init__(self, error: InvalidRequestError) -> None:
        self.error = error


def add_service(server: grpc.aio.Server, service: ServiceDescriptor, servicer: object) -> None:
    """Register a servicer that may lack methods: those answer UNIMPLEMENTED, with rich details.

    The base classes of the generated code answer UNIMPLEMENTED without a reason that a program or
    a person could read. A request that cannot be read is INVALID_ARGUMENT, which takes a server with the
    `CallInterceptor`.

    Raises:
        TypeError: the servicer has a method that the service has not.
    """
    names = {method.name for method in service.methods}
    strays = [name for name in vars(type(servicer)) if name[0].isupper() and name not in names]
    if strays:
        raise TypeError(f"{service.full_name} has no method {', '.join(strays)}")
    handlers = {method.name: _handler(method, servicer) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _handler(method: MethodDescriptor, servicer: object) -> grpc.RpcMethodHandler[Any, Any]:
    behaviour: Callable[..., Any] = getattr(servicer, method.name, None) or _unimplemented(method)
    return make_handler(
        behaviour,
        streams=(method.client_streaming, method.server_streaming),
        request_deserializer=_reader(method),
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )


def _reader(method: MethodDescriptor) -> Callable[[bytes], Any]:
    """What reads a request of `method`. One that cannot be read is `Malformed`, or raised within a stream."""
    from_bytes = GetMessageClass(method.input_type).FromString
    in_stream = method.client_streaming

    def read(data: bytes) -> Any:
        try:
            return from_bytes(data)
        except DecodeError:
            error = InvalidRequestError(
                f"the request of {method.name} is no {method.input_type.full_name}: its bytes cannot be read"
            )
            if in_stream:
                # The handler asks for it, and so is told.
                raise error from None
            return Malformed(error)

    return read


def make_handler(
    behaviour: Callable[..., Any],
    *,
    streams: tuple[bool, bool],
    request_deserializer: Callable[[bytes], Any] | None,
    response_serializer: Callable[[Any], bytes] | None,
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the kind that a method wants: `streams` says which of requests and responses are many."""
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[streams]
    handler: grpc.RpcMethodHandler[Any, Any] = make(behaviour, request_deserializer, response_serializer)
    return handler


def _unimplemented(method: MethodDescriptor) -> Callable[..., Any]:
    def not_yet() -> NotImplementedYetError:
        return NotImplementedYetError(
            f"{method.name} is part of the API, but this version cannot do it yet",
            method=method.full_name,
        )

    async def unary(request: object, context: Context) -> object:
        raise not_yet()

    async def stream(request: object, context: Context) -> AsyncIterator[object]:
        nothing: tuple[object, ...] = ()
        for response in nothing:
            yield response
        raise not_yet()

    return stream if method.server_streaming else unary
