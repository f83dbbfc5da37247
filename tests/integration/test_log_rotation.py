"""What is kept of an engine's output that nobody has bounded for a while."""

from __future__ import annotations

from pathlib import Path

from nodeagent.runtimes import _log_file


def test_what_grew_while_no_agent_ran_is_cut_to_its_end_at_once(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_bytes(b"old\n" * 100_000 + b"new\n" * 100)

    _log_file.rotate(path, max_bytes=400)

    assert {each.name: each.stat().st_size for each in tmp_path.iterdir()} == {
        "engine.log": 0,
        "engine.log.1": 400,
    }
    assert path.with_name("engine.log.1").read_bytes() == b"new\n" * 100
