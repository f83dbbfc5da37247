"""The doctor's look at this box: packages, GPUs, Docker, disk."""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rung.cli._doctor_check import Check, CheckStatus
from rung.cli.views import format_bytes

_GIB = 1024**3
_LEAST_FREE_BYTES = 1 * _GIB
_COMFORTABLE_FREE_BYTES = 10 * _GIB
_DOCKER_SOCKET = "/var/run/docker.sock"
_DOCKER_TIMEOUT_S = 5.0
#: A module of each extra that nothing else brings in.
_EXTRAS = {"server": ("sqlalchemy", "uvicorn"), "agent": ("docker", "pynvml")}


class DiskUsage(Protocol):
    """What `shutil.disk_usage` returns."""

    @property
    def free(self) -> int:
        """Free bytes."""
        ...


def check_packages(installed: Callable[[str], bool] | None = None) -> Check:
    """Which parts of Rung can run from this environment. None is needed to be a client."""
    has = installed or (lambda module: importlib.util.find_spec(module) is not None)
    missing = [extra for extra, modules in _EXTRAS.items() if not all(map(has, modules))]
    present = [extra for extra in ("client", *_EXTRAS) if extra not in missing]
    detail = f"installed for: {', '.join(present)}"
    if not missing:
        return Check(name="Packages", status=CheckStatus.OK, detail=detail)
    hint = f"To run the rest here: pip install 'rung[{','.join(missing)}]'."
    return Check(name="Packages", status=CheckStatus.WARN, detail=detail, hint=hint)


def check_disk(state_dir: Path, usage: Callable[[Path], DiskUsage]) -> Check:
    """Room for logs, the job store and model files."""
    existing = next(folder for folder in (state_dir, *state_dir.absolute().parents) if folder.exists())
    free = usage(existing).free
    detail = f"{format_bytes(free)} free for {state_dir}"
    if not os.access(existing, os.W_OK):
        hint = "Give --state-dir a folder that you may write to."
        return Check(name="Disk", status=CheckStatus.FAIL, detail=f"{existing} is not writable", hint=hint)
    if free < _LEAST_FREE_BYTES:
        hint = "The job store stops when the disk is full: make room."
        return Check(name="Disk", status=CheckStatus.FAIL, detail=detail, hint=hint)
    if free < _COMFORTABLE_FREE_BYTES:
        hint = "Enough for logs and jobs, not for model files."
        return Check(name="Disk", status=CheckStatus.WARN, detail=detail, hint=hint)
    return Check(name="Disk", status=CheckStatus.OK, detail=detail)


def check_gpus(load: Callable[[], Any] | None = None) -> Check:
    """What NVML sees. May block where a driver is wedged.

    Args:
        load: imports `pynvml`.
    """
    try:
        nvml = (load or (lambda: importlib.import_module("pynvml")))()
    except ImportError:
        hint = "pip install 'rung[agent]' to look at GPUs from here."
        return Check(name="GPUs", status=CheckStatus.WARN, detail="pynvml is not installed", hint=hint)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return _no_nvml(str(error))
    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        names = [_gpu_words(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        hint = "`nvidia-smi` says more; after a driver update a reboot is needed."
        return Check(name="GPUs", status=CheckStatus.FAIL, detail=f"NVML fails: {error}", hint=hint)
    finally:
        nvml.nvmlShutdown()
    if not names:
        return _no_nvml(f"driver {driver} sees no GPU")
    return Check(name="GPUs", status=CheckStatus.OK, detail=f"{'; '.join(names)} (driver {driver})")


def check_docker(socket_path: str | None = None) -> Check:
    """Whether Docker answers, and can hand GPUs to containers. Blocks for some seconds at most."""
    path = socket_path or os.environ.get("DOCKER_HOST", "").removeprefix("unix://") or _DOCKER_SOCKET
    if path.startswith(("tcp://", "ssh://")):
        return _docker(CheckStatus.WARN, f"DOCKER_HOST is {path}", "Not looked at from here.")
    if not os.path.exists(path):
        return _docker(
            CheckStatus.WARN,
            f"not installed ({path} is not there)",
            "Only engines with the runtime `docker` need it; `process` and `external` work without.",
        )
    try:
        with _docker_connection(path) as connection:
            server = _docker_get(connection, "/version")
            info = _docker_get(connection, "/info")
    except PermissionError:
        return _docker(
            CheckStatus.WARN,
            f"no permission for {path}",
            "Add yourself to its group, then log in again: sudo usermod -aG docker $USER.",
        )
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _docker(
            CheckStatus.WARN, f"{path} does not answer ({error})", "Start it: sudo systemctl start docker."
        )
    runtimes = info.get("Runtimes") or {}
    devices = info.get("DiscoveredDevices") or []
    gpus = "nvidia" in runtimes or any("nvidia" in str(device) for device in devices)
    detail = f"Docker {server.get('Version', '?')}, {'with' if gpus else 'without'} NVIDIA runtime"
    hint = "" if gpus else "For engines on NVIDIA GPUs in containers install nvidia-container-toolkit."
    return _docker(CheckStatus.OK, detail, hint)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_DOCKER_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@contextmanager
def _docker_connection(path: str) -> Iterator[_UnixConnection]:
    connection = _UnixConnection(path)
    try:
        yield connection
    finally:
        connection.close()


def _docker_get(connection: _UnixConnection, path: str) -> dict[str, Any]:
    connection.request("GET", path)
    reply = connection.getresponse()
    body = json.loads(reply.read())
    if reply.status != http.client.OK or not isinstance(body, dict):
        raise ValueError(f"{path} answers {reply.status}")
    return body


def _docker(status: CheckStatus, detail: str, hint: str) -> Check:
    return Check(name="Docker", status=status, detail=detail, hint=hint)


def _no_nvml(detail: str) -> Check:
    return Check(
        name="GPUs",
        status=CheckStatus.WARN,
        detail=f"no NVIDIA GPU here ({detail})",
        hint="Fine for a control plane, a client or CPU engines; else install the NVIDIA driver.",
    )


def _gpu_words(nvml: Any, index: int) -> str:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = _text(nvml.nvmlDeviceGetName(handle))
    try:
        return f"{name} with {format_bytes(nvml.nvmlDeviceGetMemoryInfo(handle).total)}"
    except nvml.NVMLError:
        # The GB10 has no memory of its own to tell of.
        return f"{name}, memory shared with the host"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
