"""The HTTP gateway: OpenAI's routes, job streams for browsers, health and metrics."""

from controlplane.gateway._app import Gateway

__all__ = ["Gateway"]
