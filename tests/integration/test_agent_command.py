"""`rung agent run` as a person starts it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import yaml

from controlplane.local import rung_command
from tests.integration.stack import RungProcess


async def test_a_second_agent_is_refused_and_an_option_changes_that_one_setting(tmp_path: Path) -> None:
    state_dir, config = tmp_path / "state", tmp_path / "agent.yaml"
    config.write_text(
        yaml.safe_dump({"state_dir": str(state_dir), "port": 0, "log": {"level": "error", "form": "console"}})
    )
    arguments = ["agent", "run", "--config", str(config), "--log-level", "info"]
    first = RungProcess(arguments, state_dir / "agent.json", tmp_path / "agent.log")
    await first.start()
    try:
        second = await asyncio.create_subprocess_exec(
            *rung_command(*arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(30):
            output, errors = await second.communicate()
        assert second.returncode == 1
        assert output == b""
        assert errors.decode() == (
            f"error: another agent uses {state_dir}; stop it, or give this one another state_dir\n"
        )
        assert (state_dir / "agent.json").exists(), "the first one is not disturbed"
    finally:
        assert await first.end(signal.SIGTERM) == 0
    # The level is that of the option, the form still that of the file.
    assert "agent_ready" in first.log()
    assert '"event"' not in first.log()
