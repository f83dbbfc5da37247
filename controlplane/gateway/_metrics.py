"""What Prometheus is told about HTTP requests."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram

#: The route of a path that there is not. Paths are the caller's to choose, and so never labels.
UNMATCHED = "unmatched"
#: The method of a request that matched nothing, if it is none of these: a caller may make up any.
_OTHER = "other"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestMetrics:
    """Counts requests, and how long they took, by the pattern of their route."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "rung_http_requests",
            "HTTP requests by route, method and status",
            ["route", "method", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "rung_http_request_seconds",
            "Time from a request's headers to the end of its answer, streams included",
            ["route", "method"],
            buckets=(0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
            registry=registry,
        )
        # Routes, methods and statuses are few; finding a labelled child costs more than counting it.
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def record(self, request: web.Request, status: int, seconds: float) -> None:
        """Count a request that has been answered, or whose caller has gone."""
        resource = request.match_info.route.resource
        route = UNMATCHED if resource is None else resource.canonical
        key = (route, request.method, status)
        children = self._children.get(key)
        if children is None:
            method = request.method if request.method in _METHODS else _OTHER
            children = (
                self._requests.labels(route, method, str(status)),
                self._seconds.labels(route, method),
            )
            if method is not _OTHER:
                self._children[key] = children
        requests, histogram = children
        requests.inc()
        histogram.observe(seconds)
