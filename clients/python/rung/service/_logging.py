"""Structured logs: JSON lines for machines, colours for a terminal."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

#: Keys whose values never reach a log.
_SECRET_KEYS = frozenset({"authorization", "api_key", "token", "password", "secret", "private_key"})


def configure_logging(*, level: str = "info", form: Literal["auto", "json", "console"] = "auto") -> None:
    """Set up structlog, and route the standard library's loggers through it, to stderr.

    Args:
        level: least level to show: `debug`, `info`, `warning` or `error`.
        form: `auto` is `console` on a terminal and `json` elsewhere.
    """
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact,
    ]
    renderer: structlog.typing.Processor
    if console:
        # Without the values of variables: keys are among them.
        tracebacks = structlog.dev.RichTracebackFormatter(show_locals=False)
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=tracebacks)
    else:
        shared.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Their own access lines repeat ours, and Alembic tells at every start what it is.
    for noisy in ("alembic", "docker", "httpcore", "httpx", "urllib3", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _redact(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key in event:
        if key.lower() in _SECRET_KEYS:
            event[key] = "[redacted]"
    return event
