"""What the control plane and the node agent have in common. Needs `rung[server]` or `rung[agent]`."""

from rung.service._config_file import (
    ByteSize,
    DurationS,
    FieldError,
    OtherFile,
    load_json_lines_model,
    load_yaml_model,
    parse_duration,
)
from rung.service._config_model import ConfigModel, LogConfig, published_schema
from rung.service._engine_client import EngineClient, EngineReply
from rung.service._host import host_id
from rung.service._interceptors import CallInterceptor, refusal_of
from rung.service._interpreter import favour_event_loop
from rung.service._logging import configure_logging
from rung.service._multipart import FormFile, form
from rung.service._retry_after import parse_retry_after, parse_seconds, seconds_until
from rung.service._server import GrpcServer, ServerOptions, cannot_listen, require_loopback
from rung.service._services import add_service
from rung.service._signal import Signal
from rung.service._sse import SseSplitter, event_data
from rung.service._stream_pacer import StreamPacer

__all__ = [
    "ByteSize",
    "CallInterceptor",
    "ConfigModel",
    "DurationS",
    "EngineClient",
    "EngineReply",
    "FieldError",
    "FormFile",
    "GrpcServer",
    "LogConfig",
    "OtherFile",
    "ServerOptions",
    "Signal",
    "SseSplitter",
    "StreamPacer",
    "add_service",
    "cannot_listen",
    "configure_logging",
    "event_data",
    "favour_event_loop",
    "form",
    "host_id",
    "load_json_lines_model",
    "load_yaml_model",
    "parse_duration",
    "parse_retry_after",
    "parse_seconds",
    "published_schema",
    "refusal_of",
    "require_loopback",
    "seconds_until",
]
