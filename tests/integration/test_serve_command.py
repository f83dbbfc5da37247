"""`rung serve` as a person starts it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp
import pytest

from controlplane.local import rung_command
from tests.integration.stack import RungProcess


async def test_without_a_configuration_it_says_so_and_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("RUNG_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("RUNG_CONFIG", raising=False)
    serve = RungProcess(
        ["serve", "--grpc-port", "0", "--http-port", "0"],
        tmp_path / "state" / "controlplane.json",
        tmp_path / "serve.log",
    )
    await serve.start()
    try:
        port = serve.ready["http_port"]
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            async with http.get("/healthz") as response:
                assert response.status == 200
            async with http.get("/metrics") as response:
                metrics = await response.text()
        second = await asyncio.create_subprocess_exec(
            *rung_command("serve", "--state-dir", str(tmp_path / "other"), "--grpc-port", "0"),
            *("--http-port", str(port)),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await asyncio.wait_for(second.communicate(), 60)
    finally:
        assert await serve.end(signal.SIGTERM) == 0

    assert 'rung_http_requests_total{method="GET",route="/healthz",status="200"} 1.0' in metrics
    assert "_created" not in metrics
    assert second.returncode == 1
    assert (
        f"error: the HTTP gateway cannot listen on 127.0.0.1:{port}: Address already in use; "
        "stop what listens there, or choose another port"
    ) in said.decode()
    log = serve.log()
    assert '"config": "none, all defaults"' in log
    assert "no_nodes" in log
    assert "`rung config init` writes a configuration to start with" in log
