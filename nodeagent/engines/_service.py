"""What adapters of engines with dialects of their own have in common."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from nodeagent.engines._base import EngineStream, RunKind
from rung.errors import InvalidRequestError
from rung.types import DeploymentSpec, ServiceEngine


def require_dialect(spec: DeploymentSpec, dialect: str) -> None:
    """Raises InvalidRequestError for a deployment of another kind of engine."""
    engine = spec.engine.engine
    if not isinstance(engine, ServiceEngine) or engine.dialect != dialect:
        raise InvalidRequestError(f"{spec.id} is not a deployment of {dialect}", deployment=spec.id)


class NoOpenAiRoutes:
    """A part of an adapter whose engine has none of OpenAI's routes; `engine_name` is for a person."""

    engine_name: str

    def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AbstractAsyncContextManager[EngineStream]:
        """Always raises InvalidRequestError: there is no such route."""
        raise InvalidRequestError(
            f"{spec.id}: {self.engine_name} has no route for {kind}", deployment=spec.id
        )
