"""Engines in containers, through the Docker Engine API; its blocking SDK stays off the event loop."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

import docker
import docker.errors
import requests.exceptions  # noqa: TID251 - what the Docker SDK raises when the daemon is away
import structlog
from docker.models.containers import Container
from docker.types import DeviceRequest, LogConfig, Mount

from nodeagent.runtimes import _proc
from nodeagent.runtimes._allow import AllowList
from nodeagent.runtimes._base import EngineExit, LaunchPlan, OnProgress, RunningEngine, RuntimeProgress
from nodeagent.runtimes._docker_events import ContainerEvents
from nodeagent.runtimes._docker_state import LIVE, complaint_of, how_it_ended, restarted
from nodeagent.runtimes._docker_stream import read_stream
from rung.errors import EngineStartFailedError, InvalidRequestError, RungError, UnavailableError
from rung.types import DockerRuntime

T = TypeVar("T")

_log = structlog.get_logger("rung.agent")

#: Labels by which an agent knows its containers.
LABEL_NODE = "rung.node"
LABEL_OWNER = "rung.owner"
LABEL_DEPLOYMENT = "rung.deployment"
LABEL_GENERATION = "rung.generation"
LABEL_SPEC_HASH = "rung.spec-hash"

_CALL_TIMEOUT_S = 60
_CALL_THREADS = 4
_LAST_WORDS = 20
#: After SIGKILL a container is gone in no time, unless a process of it hangs in the kernel.
_KILL_PATIENCE_S = 10
_FAILURES = (docker.errors.DockerException, requests.exceptions.RequestException)


class DockerEngineRuntime:
    """Runs engines as containers that this agent labels as its own.

    They are never restarted by Docker: an engine that came back by itself would take memory that
    nobody planned for. Their ports are published on the loopback interface only.
    """

    def __init__(self, allow: AllowList, state_dir: Path, node_id: str, *, gpus_available: bool) -> None:
        self._allow = allow
        self._node_id = node_id
        self._owner = _proc.owner_mark(node_id, state_dir)
        self._gpus_available = gpus_available
        self._client: docker.DockerClient | None = None
        self._connecting = threading.Lock()
        self._pool = ThreadPoolExecutor(_CALL_THREADS, thread_name_prefix="docker")
        self._events = ContainerEvents(f"{LABEL_OWNER}={self._owner}", self._lines)
        self._complaints: dict[str, str] = {}

    def check(self, plan: LaunchPlan) -> None:
        """Refuse what the allow-list has not. See `EngineRuntime.check`."""
        if not isinstance(plan.runtime, DockerRuntime):
            raise InvalidRequestError(f"{plan.deployment_id} is not to be run in a container")
        self._allow.check_docker(plan.runtime)

    async def start(self, plan: LaunchPlan, on_progress: OnProgress) -> RunningEngine:
        """Start a container, its image pulled if it is not there. See `EngineRuntime.start`."""
        self.check(plan)
        runtime = plan.runtime
        assert isinstance(runtime, DockerRuntime)
        try:
            await self._call(lambda client: client.images.get(runtime.image))
        except docker.errors.ImageNotFound:
            await self._pull(runtime.image, on_progress)
        except _FAILURES as error:
            raise _away(error) from error
        on_progress(RuntimeProgress(f"starting a container of {runtime.image}"))
        name = f"rung-{self._node_id}-{plan.deployment_id}"
        await self._mapped(lambda client: _remove_leftover(client, name, self._owner))
        starting = asyncio.ensure_future(self._call(lambda client: self._run(client, name, plan, runtime)))
        try:
            container = await asyncio.shield(starting)
        except BaseException as error:
            await _to_its_end(self._take_back(starting, name))
            if not isinstance(error, _FAILURES):
                raise
            raise EngineStartFailedError(
                f"the container of {plan.deployment_id} cannot be started: {_text(error)}",
                deployment=plan.deployment_id,
            ) from error
        return RunningEngine(
            deployment_id=plan.deployment_id,
            generation=plan.generation,
            spec_hash=plan.spec_hash,
            base_url=f"http://127.0.0.1:{plan.port}",
            pid=int(container.attrs["State"].get("Pid") or 0),
            container_id=str(container.id),
        )

    def _run(
        self, client: docker.DockerClient, name: str, plan: LaunchPlan, runtime: DockerRuntime
    ) -> Container:
        options: dict[str, Any] = {}
        if self._gpus_available or plan.gpus:
            wanted = {"device_ids": list(plan.gpus)} if plan.gpus else {"count": -1}
            options["device_requests"] = [DeviceRequest(capabilities=[["gpu"]], **wanted)]
        if runtime.shared_memory_bytes:
            options["shm_size"] = runtime.shared_memory_bytes
        container = client.containers.create(
            runtime.image,
            command=[*runtime.command, *plan.arguments],
            name=name,
            labels={
                LABEL_NODE: self._node_id,
                LABEL_OWNER: self._owner,
                LABEL_DEPLOYMENT: plan.deployment_id,
                LABEL_GENERATION: str(plan.generation),
                LABEL_SPEC_HASH: plan.spec_hash,
            },
            environment={**plan.environment, **runtime.environment},
            ports={f"{plan.listen_port}/tcp": ("127.0.0.1", plan.port)},
            mounts=[
                Mount(target=mount.target, source=mount.source, type="bind", read_only=not mount.writable)
                for mount in runtime.mounts
            ],
            # An init reaps what the engine leaves behind, and passes signals on.
            init=True,
            # Docker's default, `no`, stays: it never restarts one by itself.
            log_config=LogConfig(type=LogConfig.types.JSON, config={"max-size": "16m", "max-file": "3"}),
            detach=True,
            **options,
        )
        container.start()
        container.reload()
        published = container.attrs["NetworkSettings"]["Ports"].get(f"{plan.listen_port}/tcp")
        if container.status in LIVE and not published:
            raise EngineStartFailedError(
                f"the port of {plan.deployment_id} cannot be published: "
                "this Docker Engine has no bridge network (dockerd --bridge=none)",
                deployment=plan.deployment_id,
            )
        return container

    async def _take_back(self, starting: asyncio.Future[Container], name: str) -> None:
        """Remove what a start has made, once the daemon is no longer at it."""
        await asyncio.wait([starting])
        # Seen: whoever waited for it knows how it went.
        starting.exception()
        await self._mapped(lambda client: _remove_leftover(client, name, self._owner))

    async def _pull(self, image: str, on_progress: OnProgress) -> None:
        """Pull an image; a pull that is left goes no further. What is wrong may come in its stream."""
        repository, _, tag = image.partition("@") if "@" in image else _split_tag(image)
        sizes: dict[str, tuple[int, int]] = {}
        lines = self._lines(
            lambda client: client.api.pull(repository, tag=tag or "latest", stream=True, decode=True)
        )
        try:
            async with aclosing(lines):
                async for line in lines:
                    if "error" in line:
                        raise EngineStartFailedError(
                            f"the image {image} cannot be pulled: {line['error']}", image=image
                        )
                    status = line.get("status", "")
                    on_progress(RuntimeProgress(f"pulling {image}: {status}", _percent(sizes, line)))
        except UnavailableError as error:
            if isinstance(error.__cause__, docker.errors.APIError):
                raise EngineStartFailedError(
                    f"the image {image} cannot be pulled: {_text(error.__cause__)}", image=image
                ) from error
            raise

    async def find(self, record: RunningEngine) -> bool:
        """Whether exactly this container runs."""
        if not record.container_id:
            return False
        container = await self._container(record)
        return container is not None and container.status in LIVE

    async def wait(self, record: RunningEngine) -> EngineExit:
        """Return when the container has ended or was removed; one that was started anew has ended, too."""
        try:
            code, detail = await self._end_of(record)
        finally:
            self._complaints.pop(record.container_id, None)
        last_words: list[str] = []
        # Docker refuses the output of a container that is about to be removed.
        with suppress(UnavailableError):
            last_words = [line async for line in self.log(record, tail_lines=_LAST_WORDS, follow=False)]
        return EngineExit(exit_code=code, detail=detail, log_tail=tuple(last_words))

    async def _end_of(self, record: RunningEngine) -> tuple[int | None, str]:
        """The exit code of a container and how it ended, once it has; notes its health meanwhile."""
        with self._events.listening(record.container_id) as listener:
            seen: dict[str, Any] | None = None
            while True:
                container = await self._container(record)
                if container is None:
                    code, how = how_it_ended(seen, listener.heard)
                    return code, "was removed" if code is None else f"{how}, and was removed"
                if container.status not in LIVE:
                    return how_it_ended(container.attrs, listener.heard)
                if seen is not None and restarted(seen, container.attrs):
                    return None, "was started anew through Docker"
                seen = container.attrs
                self._complaints[record.container_id] = complaint_of(seen)
                await listener.news()

    def complaint(self, record: RunningEngine) -> str:
        """What the HEALTHCHECK of the image finds wrong, as far as whoever waits has heard; "" if nothing."""
        return self._complaints.get(record.container_id, "")

    async def stop(self, record: RunningEngine, grace_s: float) -> None:
        """Stop the container politely, then by force, and remove it.

        Raises:
            UnavailableError: it still runs, or Docker is away.
        """

        def stop(client: docker.DockerClient) -> None:
            with suppress(docker.errors.NotFound):
                _end(client.containers.get(record.container_id), record.deployment_id, grace_s)

        if record.container_id:
            await self._mapped(stop)

    async def log(self, record: RunningEngine, *, tail_lines: int, follow: bool) -> AsyncIterator[str]:
        """The newest lines of its output; with `follow` until it ends."""
        if not record.container_id:
            return
        partial = b""
        pieces = self._lines(lambda client: _read_log(client, record.container_id, tail_lines, follow=follow))
        async with aclosing(pieces):
            async for data in pieces:
                *whole, partial = (partial + data).replace(b"\r", b"\n").split(b"\n")
                for line in whole:
                    if line:
                        yield line.decode("utf-8", "replace")
        if partial:
            yield partial.decode("utf-8", "replace")

    async def pids(self, record: RunningEngine) -> frozenset[int]:
        """The container's processes as the host sees them."""
        container = await self._container(record)
        pid = int(container.attrs["State"].get("Pid") or 0) if container is not None else 0
        return _proc.descendants(pid) if pid else frozenset()

    async def strays(self, known: frozenset[str]) -> tuple[RunningEngine, ...]:
        """Containers with this node's label whose deployment is not in `known`; none without a daemon."""
        filters: dict[str, str | list[str] | bool] = {"label": f"{LABEL_OWNER}={self._owner}"}
        try:
            found = await self._mapped(lambda client: client.containers.list(all=True, filters=filters))
        except UnavailableError:
            return ()
        return tuple(
            RunningEngine(
                deployment_id=container.labels.get(LABEL_DEPLOYMENT, ""),
                generation=int(container.labels.get(LABEL_GENERATION, "0")),
                spec_hash=container.labels.get(LABEL_SPEC_HASH, ""),
                base_url="",
                container_id=str(container.id),
            )
            for container in found
            if container.labels.get(LABEL_DEPLOYMENT, "") not in known
        )

    async def aclose(self) -> None:
        """Let go of the daemon; containers go on."""
        await self._events.aclose()
        self._pool.shutdown(wait=False, cancel_futures=True)
        client, self._client = self._client, None
        if client is not None:
            client.close()

    async def _container(self, record: RunningEngine) -> Container | None:
        try:
            return await self._mapped(lambda client: client.containers.get(record.container_id))
        except UnavailableError as error:
            if isinstance(error.__cause__, docker.errors.NotFound):
                return None
            raise

    async def _mapped(self, work: Callable[[docker.DockerClient], T]) -> T:
        try:
            return await self._call(work)
        except _FAILURES as error:
            raise _away(error) from error

    async def _call(self, work: Callable[[docker.DockerClient], T]) -> T:
        """Run blocking work in a thread. A daemon that is away is an UnavailableError at once."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(self._connected()))

    def _connected(self) -> docker.DockerClient:
        with self._connecting:
            if self._client is None:
                self._client = _connect(None)
            return self._client

    async def _lines(self, read: Callable[[docker.DockerClient], Iterator[T]]) -> AsyncGenerator[T, None]:
        """What a blocking iterator gives; see `read_stream`. Raises UnavailableError."""
        stream = read_stream(lambda: _connect(self._connected().api.api_version), read)
        async with aclosing(stream):
            try:
                async for piece in stream:
                    yield piece
            except RungError:
                raise
            except Exception as error:
                raise _away(error) from error


def _connect(api_version: str | None) -> docker.DockerClient:
    """A client; without a version of the API, after asking for it. Raises UnavailableError."""
    try:
        return docker.from_env(timeout=_CALL_TIMEOUT_S, version=api_version)
    except _FAILURES as error:
        raise _away(error) from error


def _end(container: Container, deployment_id: str, grace_s: float) -> None:
    """End a container, politely first, and remove it.

    Raises:
        UnavailableError: it still runs.
        docker.errors.NotFound: it is gone already.
    """
    refusal = ""
    try:
        # Docker kills it when the time is over. It is always given: without it the SDK gives up before
        # a patient container does.
        container.stop(timeout=math.ceil(grace_s))
        container.reload()
        if container.status in LIVE:
            container.kill()
            container.wait(timeout=_KILL_PATIENCE_S)
    except docker.errors.NotFound:
        raise
    except _FAILURES as error:
        refusal = f" ({_text(error)})"
    container.reload()
    if container.status in LIVE:
        raise UnavailableError(
            f"the container {container.short_id} of {deployment_id} does not end{refusal}; "
            "the machine may need a look",
            deployment=deployment_id,
        )
    try:
        container.remove(force=True, v=True)
    except docker.errors.NotFound:
        raise
    except docker.errors.APIError as error:
        # It holds no memory any more; the next start of its deployment removes it.
        _log.warning("container_not_removed", container=container.short_id, error=_text(error))


def _read_log(
    client: docker.DockerClient, container_id: str, tail_lines: int, *, follow: bool
) -> Iterator[bytes]:
    try:
        if follow:
            yield from client.api.logs(container_id, stream=True, follow=True, tail=tail_lines)
        else:
            yield client.api.logs(container_id, tail=tail_lines)
    except docker.errors.NotFound:
        return


def _remove_leftover(client: docker.DockerClient, name: str, owner: str) -> None:
    """Remove a container of that name if it is ours. Raises EngineStartFailedError if it is not."""
    try:
        container = client.containers.get(name)
    except docker.errors.NotFound:
        return
    if container.labels.get(LABEL_OWNER) != owner:
        raise EngineStartFailedError(
            f"a container named {name} is there that this agent did not make; remove or rename it"
        )
    container.remove(force=True, v=True)


def _percent(sizes: dict[str, tuple[int, int]], line: dict[str, Any]) -> float | None:
    """How much of the layers seen so far is here, given a line of a pull; notes the line in `sizes`."""
    detail = line.get("progressDetail") or {}
    if line.get("id") and detail.get("total") and line.get("status") == "Downloading":
        sizes[line["id"]] = (int(detail.get("current", 0)), int(detail["total"]))
    total = sum(size for _, size in sizes.values())
    return 100 * sum(now for now, _ in sizes.values()) / total if total else None


def _split_tag(image: str) -> tuple[str, str, str]:
    """Repository and tag; a colon before the last slash belongs to a registry's port."""
    head, colon, tag = image.rpartition(":")
    return (head, colon, tag) if colon and "/" not in tag else (image, "", "")


def _text(error: BaseException) -> str:
    return str(getattr(error, "explanation", None) or error)


def _away(error: BaseException) -> UnavailableError:
    """What to tell of a failure: the daemon's own words if it has answered, else what may be done."""
    if isinstance(error, docker.errors.APIError):
        return UnavailableError(f"Docker refuses: {_text(error)}")
    cause = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    why = (isinstance(cause, OSError) and cause.strerror) or _text(cause)
    advice = "start it (systemctl start docker), or set DOCKER_HOST for the agent"
    if isinstance(cause, PermissionError):
        advice = "add the agent's user to the group docker"
    place = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    return UnavailableError(f"no Docker Engine answers at {place} ({why}); {advice}")


async def _to_its_end(work: Awaitable[None]) -> None:
    """Wait for work that must be done, however often its caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()
