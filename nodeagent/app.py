"""Composition root of the agent: wires everything, and runs until it is told to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from types import TracebackType
from urllib.parse import urlsplit

import structlog
import uvloop
from google.protobuf.descriptor_pool import Default
from prometheus_client import CollectorRegistry

from nodeagent.api import Drain, NodeAgentServicer
from nodeagent.config import AgentConfig
from nodeagent.discovery import discover
from nodeagent.engines import adapter_for
from nodeagent.runtimes import (
    DockerEngineRuntime,
    EngineRuntime,
    ExternalEngineRuntime,
    ProcessEngineRuntime,
    become_subreaper,
)
from nodeagent.supervisor import Records, Supervisor
from nodeagent.telemetry import Telemetry
from rung.errors import RungError
from rung.service import (
    CallInterceptor,
    EngineClient,
    GrpcServer,
    ServerOptions,
    add_service,
    configure_logging,
    favour_event_loop,
)
from rung.transport import MAX_MESSAGE_BYTES
from rung.types import (
    DeploymentSpec,
    DockerRuntime,
    ExternalRuntime,
    NodeStatus,
    ProcessRuntime,
    Runtime,
)

_log = structlog.get_logger("rung.agent")

#: Engines that somebody else starts later are looked for this often.
_DISCOVERY_INTERVAL_S = 10.0
#: What is left at the end of a stop gets so long: last messages on their way, and operations.
_STOP_GRACE_S = 1.0


def run(config: AgentConfig) -> int:
    """Serve until SIGTERM or SIGINT, and then until what is generated ends; returns the exit code.

    A second signal cuts what is generated. Engines go on.
    """
    configure_logging(level=config.log.level, form=config.log.form)
    try:
        uvloop.run(serve(config))
    except (RungError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


async def serve(config: AgentConfig) -> None:
    """Start everything, wait for a signal, drain, let go.

    Raises:
        RungError: another agent uses the state folder, or a port that is not loopback.
        OSError: the port is taken, or the state folder cannot be written.
    """
    stop = asyncio.Event()
    drain = Drain(config.node_id)

    def told_to_stop() -> None:
        if stop.is_set():
            drain.cut()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop)
    become_subreaper()
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    async with AsyncExitStack() as stack:
        records = Records(config.state_dir)
        stack.callback(records.close)
        client = EngineClient()
        stack.push_async_callback(client.aclose)
        telemetry = Telemetry(
            state_dir=config.state_dir, simulated_gpus=config.simulated_gpus, agent_version=version("rung")
        )
        await telemetry.start()
        stack.push_async_callback(telemetry.aclose)
        runtimes = _runtimes(config, gpus_available=bool(telemetry.status.gpus))
        for runtime in runtimes.values():
            stack.push_async_callback(runtime.aclose)
        supervisor = Supervisor(
            node_id=config.node_id,
            records=records,
            runtimes=runtimes,
            adapter_for=partial(adapter_for, client=client),
            scope=config.advertise,
            look=lambda: _look(supervisor, telemetry),
            look_soon=telemetry.look_soon,
        )
        # Which GPUs there are, before anything is done on them.
        supervisor.measured(telemetry.status)
        await supervisor.resume()
        stack.push_async_callback(supervisor.aclose)
        server = _server(config, supervisor, telemetry, drain)
        await server.start()
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        tasks = [asyncio.create_task(_keep_measuring(supervisor, telemetry), name="measure")]
        if config.discover:
            tasks.append(
                asyncio.create_task(
                    _keep_discovering(
                        supervisor, partial(discover, config.node_id, config.discover_ports.all), server.port
                    ),
                    name="discover",
                )
            )
        for task in tasks:
            stack.callback(task.cancel)
        ready_file = config.state_dir / "agent.json"
        ready_file.write_text(json.dumps({"port": server.port, "pid": os.getpid()}))
        stack.callback(ready_file.unlink, missing_ok=True)
        favour_event_loop()
        _log.info("agent_ready", node=config.node_id, port=server.port)
        await stop.wait()
        _log.info("draining", generations=drain.running, timeout_s=config.drain_timeout_s)
        await server.drain()
        drain.begin()
        await drain.end(config.drain_timeout_s)
        # Those who watch look whether it is over.
        supervisor.changed.fire()
    _log.info("agent_stopped", node=config.node_id)


def _runtimes(config: AgentConfig, *, gpus_available: bool) -> dict[type[Runtime], EngineRuntime]:
    allow = config.allow_list()
    return {
        ProcessRuntime: ProcessEngineRuntime(allow, config.state_dir, config.node_id),
        DockerRuntime: DockerEngineRuntime(
            allow,
            config.state_dir,
            config.node_id,
            gpus_available=gpus_available and config.simulated_gpus is None,
        ),
        ExternalRuntime: ExternalEngineRuntime(),
    }


def _server(config: AgentConfig, supervisor: Supervisor, telemetry: Telemetry, drain: Drain) -> GrpcServer:
    service = Default().FindServiceByName("rung.v1.NodeAgentService")
    server = GrpcServer(
        # Whatever a control plane takes from its callers, it sends on.
        ServerOptions(host=config.host, port=config.port, max_request_bytes=MAX_MESSAGE_BYTES),
        services=[service],
        interceptors=[CallInterceptor(CollectorRegistry())],
        what="the agent",
    )
    servicer = NodeAgentServicer(supervisor, telemetry, uuid.uuid4().hex, drain)
    add_service(server.server, service, servicer)
    return server


async def _look(supervisor: Supervisor, telemetry: Telemetry) -> NodeStatus:
    """A sample of this moment in which the engines of this moment have their memory."""
    telemetry.set_owners(await supervisor.owners())
    return await telemetry.look()


async def _keep_measuring(supervisor: Supervisor, telemetry: Telemetry) -> None:
    """Bring together who owns which process and how much memory each process has."""
    owners, memory = _Round("owners_not_known"), _Round("memory_not_attributed")
    async for status in telemetry.changes():
        with owners:
            telemetry.set_owners(await supervisor.owners())
        with memory:
            supervisor.measured(status)
        supervisor.changed.fire()


async def _keep_discovering(
    supervisor: Supervisor,
    find: Callable[[], Awaitable[Iterable[DeploymentSpec]]],
    own_port: int,
    interval_s: float = _DISCOVERY_INTERVAL_S,
) -> None:
    """Adopt engines that somebody else runs, now and when they come later."""
    finding = _Round("engines_not_discovered")
    while True:
        with finding:
            own = {own_port}
            for deployment in supervisor.deployments:
                if deployment.endpoint is not None:
                    own.add(urlsplit(deployment.endpoint.base_url).port or 0)
            for spec in await find():
                runtime = spec.engine.runtime
                if isinstance(runtime, ExternalRuntime) and urlsplit(runtime.base_url).port not in own:
                    _log.info("engine_adopted", deployment=spec.id, url=runtime.base_url)
                    supervisor.adopt(spec)
        await asyncio.sleep(interval_s)


class _Round:
    """One round of something that goes on for ever: what fails is logged, and the next round comes.

    Each kind of error is logged once, and again after a round that went well.
    """

    def __init__(self, event: str) -> None:
        self._event = event
        self._logged: set[type[BaseException]] = set()

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None:
            self._logged.clear()
        if not isinstance(error, Exception):
            return False
        if type(error) not in self._logged:
            self._logged.add(type(error))
            # One of ours says all that there is to say; any other is a defect, and where it is matters.
            ours = isinstance(error, RungError)
            _log.warning(self._event, error=str(error), exc_info=None if ours else error)
        return True
