"""From a spec to what is to be run, and the small calculations around a start."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from nodeagent.engines import EngineAdapter
from nodeagent.runtimes import LaunchPlan, RunningEngine
from nodeagent.supervisor._records import spec_hash
from rung.errors import EngineStartFailedError
from rung.types import DeploymentSpec, DockerRuntime, ExternalRuntime

_LAST_LINES = 5
_LAST_CHARACTERS = 1000


def launch_plan(spec: DeploymentSpec, adapter: EngineAdapter, generation: int) -> LaunchPlan:
    """What to run for a spec, on a port that is free now if the spec names none.

    Raises:
        InvalidRequestError, NotImplementedYetError: the adapter cannot serve the spec.
    """
    runtime = spec.engine.runtime
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    port = listen_port = 0
    if not isinstance(runtime, ExternalRuntime):
        port = spec.engine.port or _free_port()
        listen_port = port
        listen_host = "127.0.0.1"
        if isinstance(runtime, DockerRuntime):
            # Published on the node's loopback interface by the runtime.
            listen_port = runtime.container_port or port
            listen_host = "0.0.0.0"  # noqa: S104 - inside the container
        line = adapter.command_line(spec, listen_host=listen_host, listen_port=listen_port)
        arguments, environment = line.arguments, line.environment
    return LaunchPlan(
        deployment_id=spec.id,
        generation=generation,
        spec_hash=spec_hash(spec),
        runtime=runtime,
        arguments=arguments,
        environment=environment,
        port=port,
        listen_port=listen_port,
        gpus=spec.engine.gpus,
    )


def intended(plan: LaunchPlan) -> RunningEngine:
    """The engine of a plan before it has a process: what to look for if the agent dies meanwhile."""
    runtime = plan.runtime
    base_url = runtime.base_url if isinstance(runtime, ExternalRuntime) else f"http://127.0.0.1:{plan.port}"
    return RunningEngine(
        deployment_id=plan.deployment_id,
        generation=plan.generation,
        spec_hash=plan.spec_hash,
        base_url=base_url,
    )


def require_free_port(spec: DeploymentSpec) -> None:
    """Refuse a port of the configuration on which something else listens: it would be taken for the engine.

    Raises:
        EngineStartFailedError: it is taken.
    """
    port = spec.engine.port
    if not port or isinstance(spec.engine.runtime, ExternalRuntime):
        return
    with socket.socket() as listener:
        # As servers do: connections that an earlier engine has closed do not hold the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            # Whatever else is wrong with the port, the engine itself will say.
            if error.errno == errno.EADDRINUSE:
                raise EngineStartFailedError(
                    f"port {port} is already taken on this node; stop what listens there "
                    f"(`ss -ltnp sport = :{port}` names it), give {spec.id} another port, or none: "
                    "the agent then chooses a free one",
                    deployment=spec.id,
                ) from error


def usual_s(times_s: Sequence[float]) -> float | None:
    """The median of earlier times; None before the first."""
    return sorted(times_s)[len(times_s) // 2] if times_s else None


def last_words(lines: Sequence[str]) -> str:
    """The end of an engine's output, to be added to a message; empty if it said nothing."""
    words: list[str] = []
    room = _LAST_CHARACTERS
    for line in reversed(lines):
        text = line.strip()[:room]
        if text:
            words.insert(0, text)
            room -= len(text)
        if len(words) == _LAST_LINES:
            break
    return f"; its last words: {' | '.join(words)}" if words else ""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
