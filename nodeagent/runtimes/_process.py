"""Engines as processes of the node: for machines, and rented containers, without Docker."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import structlog

from nodeagent.runtimes import _log_file, _proc
from nodeagent.runtimes._allow import AllowedExecutable, AllowList
from nodeagent.runtimes._base import EngineExit, LaunchPlan, OnProgress, RunningEngine, RuntimeProgress
from rung.errors import EngineStartFailedError, InvalidRequestError
from rung.types import ProcessRuntime

_log = structlog.get_logger("rung.agent")

#: What an engine inherits of the agent's environment; all else stays with the agent.
_INHERITED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
_INHERITED_PREFIXES = ("LC_", "HF_", "CUDA_", "NVIDIA_", "VLLM_", "OLLAMA_")
_ROTATE_INTERVAL_S = 10.0
_REAP_INTERVAL_S = 5.0
#: After SIGKILL a process is gone in no time, unless it hangs in the kernel.
_KILL_PATIENCE_S = 10.0
_LAST_WORDS = 20


class ProcessEngineRuntime:
    """Runs engines as processes, each in a session of its own.

    They outlive the agent: nothing ties them to it but their record and the mark in their environment.
    """

    def __init__(self, allow: AllowList, state_dir: Path, node_id: str) -> None:
        self._allow = allow
        self._logs = state_dir / "logs"
        self._owner = _proc.owner_mark(node_id, state_dir)
        self._rotation: dict[Path, asyncio.Task[None]] = {}
        self._exit_codes: dict[int, int] = {}
        self._started: set[int] = set()
        self._reaping: asyncio.Task[None] | None = None

    def check(self, plan: LaunchPlan) -> None:
        """Refuse what the allow-list has not. See `EngineRuntime.check`."""
        self._allowed(plan)

    async def start(self, plan: LaunchPlan, on_progress: OnProgress) -> RunningEngine:
        """Start the process. See `EngineRuntime.start`."""
        allowed = self._allowed(plan)
        assert isinstance(plan.runtime, ProcessRuntime)
        on_progress(RuntimeProgress(f"starting {plan.runtime.executable}"))
        log_path = self._logs / plan.deployment_id / "engine.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        arguments = [allowed.path, *allowed.arguments_prefix, *plan.arguments, *plan.runtime.arguments]
        mark = f"{self._owner}/{plan.deployment_id}/{plan.generation}"
        # An own file for each start: the one before is kept.
        if log_path.exists():
            log_path.replace(log_path.with_name("engine.log.previous"))
        with log_path.open("ab") as log:
            try:
                # On the loop's own thread, and not through asyncio: whoever waits for the process
                # must not need the loop that started it.
                process = subprocess.Popen(  # noqa: ASYNC220 - returns once the process exists
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(plan, allowed, mark),
                    start_new_session=True,
                    close_fds=True,
                )
            except OSError as error:
                raise EngineStartFailedError(
                    f"{allowed.path} cannot be started: {error.strerror}", deployment=plan.deployment_id
                ) from error
        # The kernel's record is the identity from here on; Popen would warn of a child it still knows.
        process.returncode = 0
        ticks = _proc.start_time_ticks(process.pid)
        self._started.add(process.pid)
        if self._reaping is None:
            self._reaping = asyncio.create_task(self._reap_for_ever(), name="reap-orphans")
        self._keep_rotated(log_path)
        return RunningEngine(
            deployment_id=plan.deployment_id,
            generation=plan.generation,
            spec_hash=plan.spec_hash,
            base_url=f"http://127.0.0.1:{plan.port}",
            pid=process.pid,
            start_time_ticks=ticks or 0,
            boot_id=_proc.boot_id(),
            log_path=str(log_path),
        )

    async def find(self, record: RunningEngine) -> bool:
        """Whether exactly this process still runs."""
        found = _is_running(record)
        if found and record.log_path:
            self._keep_rotated(Path(record.log_path))
        return found

    async def wait(self, record: RunningEngine) -> EngineExit:
        """Return when the process has ended; its exit code is known only if this agent started it."""
        if _is_running(record):
            await _ended(record.pid)
        code = _proc.reap(record.pid)
        if code is not None:
            self._exit_codes[record.pid] = code
        code = self._exit_codes.get(record.pid)
        last_words = tuple(_log_file.tail(Path(record.log_path), _LAST_WORDS)) if record.log_path else ()
        return EngineExit(exit_code=code, detail=_how_it_ended(code), log_tail=last_words)

    async def stop(self, record: RunningEngine, grace_s: float) -> None:
        """End the process and all it started. See `EngineRuntime.stop`."""
        loop = asyncio.get_running_loop()
        if _is_running(record):
            with suppress(ProcessLookupError):
                os.killpg(record.pid, signal.SIGTERM)
            await self._all_ended(record, loop.time() + grace_s)
        deadline_s = loop.time() + _KILL_PATIENCE_S
        while left := self._members(record):
            _proc.signal_each(left, signal.SIGKILL)
            if loop.time() > deadline_s:
                raise EngineStartFailedError(
                    f"processes {sorted(left)} of {record.deployment_id} do not end; "
                    "the machine may need a look",
                    deployment=record.deployment_id,
                )
            await self._all_ended(record, min(deadline_s, loop.time() + 1.0))
        code = _proc.reap(record.pid)
        if code is not None:
            self._exit_codes[record.pid] = code
        if record.log_path and (task := self._rotation.pop(Path(record.log_path), None)):
            task.cancel()

    def _allowed(self, plan: LaunchPlan) -> AllowedExecutable:
        if not isinstance(plan.runtime, ProcessRuntime):
            raise InvalidRequestError(f"{plan.deployment_id} is not to be run as a process")
        return self._allow.executable(plan.runtime)

    def _members(self, record: RunningEngine) -> set[int]:
        """Processes of an engine: its session, and whatever carries its mark wherever it went."""
        mark = f"{self._owner}/{record.deployment_id}/{record.generation}"
        found = {pid for pid in _proc.marked(mark) if pid != os.getpid()}
        if record.boot_id == _proc.boot_id() and record.start_time_ticks:
            found.update(_proc.session_members(record.pid, record.start_time_ticks))
        return found

    async def _all_ended(self, record: RunningEngine, deadline_s: float) -> None:
        """Wait for all processes of an engine, until a time of the loop's clock."""
        loop = asyncio.get_running_loop()
        while (left := self._members(record)) and loop.time() < deadline_s:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline_s):
                    await _ended(min(left))
            for pid in left - {record.pid}:
                _proc.reap(pid)

    async def log(self, record: RunningEngine, *, tail_lines: int, follow: bool) -> AsyncIterator[str]:
        """The newest lines of its output; with `follow` until it ends."""
        path = Path(record.log_path)
        if follow:
            async for line in _log_file.follow(path, tail_lines, lambda: _is_running(record)):
                yield line
        else:
            for line in _log_file.tail(path, tail_lines):
                yield line

    async def pids(self, record: RunningEngine) -> frozenset[int]:
        """The process and its descendants."""
        return _proc.descendants(record.pid) if _is_running(record) else frozenset()

    async def strays(self, known: frozenset[str]) -> tuple[RunningEngine, ...]:
        """Marked processes whose deployment is not in `known`; one record for each deployment."""
        found: dict[str, RunningEngine] = {}
        for pid in _proc.marked(f"{self._owner}/"):
            _, deployment_id, generation = _proc.mark_of(pid).rsplit("/", 2)
            if deployment_id in known or deployment_id in found or not generation.isdigit():
                continue
            found[deployment_id] = RunningEngine(
                deployment_id=deployment_id,
                generation=int(generation),
                spec_hash="",
                base_url="",
                pid=pid,
                start_time_ticks=_proc.start_time_ticks(pid) or 0,
                boot_id=_proc.boot_id(),
                log_path=str(self._logs / deployment_id / "engine.log"),
            )
        return tuple(found.values())

    async def aclose(self) -> None:
        """Let go of the engines; they go on."""
        tasks = list(self._rotation.values())
        if self._reaping is not None:
            tasks.append(self._reaping)
        self._rotation.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _reap_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_REAP_INTERVAL_S)
            _proc.reap_orphans(self._started)

    def _environment(self, plan: LaunchPlan, allowed: AllowedExecutable, mark: str) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
        }
        assert isinstance(plan.runtime, ProcessRuntime)
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(plan.gpus)} if plan.gpus else {}
        return {
            **inherited,
            "PYTHONUNBUFFERED": "1",
            **plan.environment,
            **plan.runtime.environment,
            **allowed.environment,
            **gpus,
            _proc.MARK: mark,
        }

    def _keep_rotated(self, path: Path) -> None:
        if path not in self._rotation:
            self._rotation[path] = asyncio.create_task(_rotate_for_ever(path), name=f"rotate-{path}")


async def _rotate_for_ever(path: Path) -> None:
    while True:
        await asyncio.sleep(_ROTATE_INTERVAL_S)
        try:
            await asyncio.to_thread(_log_file.rotate, path)
        except OSError as error:
            _log.warning("log_not_rotated", path=str(path), error=str(error))


def _is_running(record: RunningEngine) -> bool:
    return _proc.is_same(record.pid, record.start_time_ticks, record.boot_id)


async def _ended(pid: int) -> None:
    """Return when a process has ended, child of ours or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not ended.done():
            ended.set_result(None)

    try:
        loop.add_reader(descriptor, on_readable)
        await ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "ended; its exit code is not known, since another agent started it"
    if code < 0:
        named = -code in set(signal.Signals)
        return f"was ended by {signal.Signals(-code).name if named else f'signal {-code}'}"
    return f"ended with exit code {code}"
