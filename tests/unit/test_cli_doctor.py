"""The doctor: each check against something real of its kind, or against a stand-in it cannot tell apart."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rung.cli import ExitCode, main
from rung.cli._doctor_box import check_disk, check_docker, check_gpus, check_packages
from rung.cli._doctor_check import CheckStatus
from rung.cli._doctor_fleet import check_control_plane, check_http, check_local_agent, check_nodes
from rung.errors import UnauthenticatedError, UnavailableError
from rung.types import FleetSnapshot, NodeState
from tests.fakes.client import FakeClient
from tests.fakes.fleet import GIB, a_fleet, a_node


@dataclass
class Usage:
    free: int


class TestBox:
    def test_packages(self) -> None:
        assert check_packages(lambda _: True).status is CheckStatus.OK
        check = check_packages(lambda module: module != "docker")
        assert check.status is CheckStatus.WARN
        assert check.detail == "installed for: client, server"
        assert check.hint == "To run the rest here: pip install 'rung[agent]'."

    @pytest.mark.parametrize(
        ("free", "status"),
        [(500 * GIB, CheckStatus.OK), (5 * GIB, CheckStatus.WARN), (GIB // 2, CheckStatus.FAIL)],
    )
    def test_disk(self, tmp_path: Path, free: int, status: CheckStatus) -> None:
        looked: list[Path] = []

        def usage(path: Path) -> Usage:
            looked.append(path)
            return Usage(free)

        assert check_disk(tmp_path / "not" / "yet", usage).status is status
        assert looked == [tmp_path]


class NvmlError(Exception):
    pass


class Nvml:
    """As much of pynvml as the doctor uses."""

    NVMLError = NvmlError

    def __init__(self, names: list[str], fault: str = "") -> None:
        self._names = names
        self._fault = fault

    def _do(self, what: str) -> None:
        if self._fault == what:
            raise NvmlError(f"{what} went wrong")

    def nvmlInit(self) -> None:  # noqa: N802 - pynvml's name
        self._do("init")

    def nvmlShutdown(self) -> None:  # noqa: N802 - pynvml's name
        pass

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802 - pynvml's name
        self._do("driver")
        return b"580.95"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - pynvml's name
        return len(self._names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 - pynvml's name
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802 - pynvml's name
        return self._names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802 - pynvml's name
        if "GB10" in self._names[handle]:
            raise NvmlError("Not Supported")
        return type("Memory", (), {"total": 32 * GIB})()


class TestGpus:
    def test_found(self) -> None:
        check = check_gpus(lambda: Nvml(["RTX 5090", "NVIDIA GB10"]))
        assert check.status is CheckStatus.OK
        assert check.detail == (
            "RTX 5090 with 32.0 GiB; NVIDIA GB10, memory shared with the host (driver 580.95)"
        )

    @pytest.mark.parametrize(
        ("nvml", "status"),
        [
            (Nvml([], "init"), CheckStatus.WARN),
            (Nvml([]), CheckStatus.WARN),
            (Nvml(["RTX 5090"], "driver"), CheckStatus.FAIL),
        ],
    )
    def test_not_found(self, nvml: Nvml, status: CheckStatus) -> None:
        check = check_gpus(lambda: nvml)
        assert check.status is status
        assert check.hint

    def test_no_pynvml(self) -> None:
        def load() -> Any:
            raise ImportError

        assert check_gpus(load).status is CheckStatus.WARN


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from a table of paths."""

    answers: ClassVar[dict[str, tuple[int, Any]]] = {}

    def do_GET(self) -> None:
        status, body = self.answers.get(self.path, (404, {}))
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class UnixServer(socketserver.ThreadingUnixStreamServer):
    """HTTP on a unix socket."""

    daemon_threads = True


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def handler(**answers: Any) -> type[Handler]:
    table = {f"/{path.replace('_', '/')}": answer for path, answer in answers.items()}
    return type("Answers", (Handler,), {"answers": table})


class TestDocker:
    @pytest.mark.parametrize(
        ("info", "words", "hinted"),
        [
            ({"Runtimes": {"runc": {}, "nvidia": {}}}, "with NVIDIA runtime", False),
            ({"Runtimes": {"runc": {}}}, "without NVIDIA runtime", True),
            (
                {"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]},
                "with NVIDIA runtime",
                False,
            ),
        ],
    )
    def test_answers(self, tmp_path: Path, info: Any, words: str, hinted: bool) -> None:
        path = str(tmp_path / "docker.sock")
        with serving(UnixServer(path, handler(version=(200, {"Version": "29.1"}), info=(200, info)))):
            check = check_docker(path)
        assert check.status is CheckStatus.OK
        assert check.detail == f"Docker 29.1, {words}"
        assert bool(check.hint) is hinted

    def test_not_installed(self, tmp_path: Path) -> None:
        check = check_docker(str(tmp_path / "docker.sock"))
        assert check.status is CheckStatus.WARN
        assert "not installed" in check.detail

    def test_not_running(self, tmp_path: Path) -> None:
        path = str(tmp_path / "docker.sock")
        with socket.socket(socket.AF_UNIX) as left_over:
            left_over.bind(path)
        check = check_docker(path)
        assert check.status is CheckStatus.WARN
        assert "systemctl start docker" in check.hint

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may open any socket")
    def test_not_permitted(self, tmp_path: Path) -> None:
        path = tmp_path / "docker.sock"
        with serving(UnixServer(str(path), handler())):
            path.chmod(0)
            check = check_docker(str(path))
        assert "usermod" in check.hint


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TestHttp:
    def test_answers(self) -> None:
        with serving(server := http.server.HTTPServer(("127.0.0.1", 0), handler(v1_models=(200, {})))):
            url = f"http://127.0.0.1:{server.server_address[1]}"
            check = check_http(url)
        assert check.status is CheckStatus.OK
        assert check.detail == f"{url} answers"

    def test_another_server(self) -> None:
        with serving(server := http.server.HTTPServer(("127.0.0.1", 0), handler())):
            check = check_http(f"http://127.0.0.1:{server.server_address[1]}")
        assert check.status is CheckStatus.FAIL
        assert "answers 404" in check.detail

    def test_nobody(self) -> None:
        assert check_http(f"http://127.0.0.1:{free_port()}").status is CheckStatus.WARN


class TestFleet:
    async def test_all_well(self) -> None:
        client = FakeClient()
        client.snapshots = [a_fleet()]
        plane, *nodes = await check_control_plane(client, "127.0.0.1:8151")
        assert plane.status is CheckStatus.OK
        assert plane.detail == "127.0.0.1:8151 answers, 2 nodes"
        assert [node.detail for node in nodes] == ["127.0.0.1:8152 is ready, 1 GPU (simulated)"] * 2

    async def test_nothing_listens(self) -> None:
        client = FakeClient()
        client.error = UnavailableError("refused")
        plane, _ = await check_control_plane(client, f"127.0.0.1:{free_port()}")
        assert plane.status is CheckStatus.WARN
        assert "rung up" in plane.hint

    async def test_something_else_listens(self) -> None:
        client = FakeClient()
        client.error = UnavailableError("not gRPC")
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            plane, _ = await check_control_plane(client, f"127.0.0.1:{port}")
            assert (await check_local_agent(port)).status is CheckStatus.OK
        assert plane.status is CheckStatus.FAIL
        assert "it is no control plane" in plane.detail

    async def test_refused(self) -> None:
        client = FakeClient()
        client.error = UnauthenticatedError("who are you?")
        (plane,) = await check_control_plane(client, "127.0.0.1:1")
        assert plane.status is CheckStatus.FAIL

    def test_nodes(self) -> None:
        assert [check.status for check in check_nodes(())] == [CheckStatus.WARN]
        states = (NodeState.READY, NodeState.CONNECTING, NodeState.UNREACHABLE)
        checks = check_nodes([a_node(state.value, state=state) for state in states])
        assert [check.status for check in checks] == [CheckStatus.OK, CheckStatus.WARN, CheckStatus.FAIL]


class TestCommand:
    def test_json_and_exit_code(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'none.sock'}")
        client = FakeClient()
        client.snapshots = [FleetSnapshot((a_node(state=NodeState.UNREACHABLE),))]
        http_url = f"http://127.0.0.1:{free_port()}"
        arguments = ["doctor", "--json", "--http", http_url, "--state-dir", str(tmp_path)]
        assert main(arguments, opening=lambda _: client) == ExitCode.FAILED
        checks = json.loads(capsys.readouterr().out)
        found = {check["name"]: check["status"] for check in checks}
        assert found["Python"] == "ok"
        assert found["Control plane"] == "ok"
        assert found["Node workstation"] == "fail"
        assert found["HTTP gateway"] == "warn"
        assert found["Docker"] == "warn"
        assert set(checks[0]) == {"name", "status", "detail", "hint"}
