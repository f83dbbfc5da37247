"""`scripts/ensure_docker.sh` on machines that do not let a daemon start as it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

#: A daemon that starts only with the options that $STARTS_WITH has, and a client that knows it.
_DOCKERD = """#!/bin/sh
echo "dockerd $*" >>"$RECORD"
case "$*" in
$STARTS_WITH) echo "$*" >"$RECORD.up" ;;
*) echo "level=fatal msg=\\"not permitted: $*\\""; exit 1 ;;
esac
"""
_DOCKER = """#!/bin/sh
test -n "$REFUSES" && echo "permission denied while trying to connect" >&2 && exit 1
test -e "$RECORD.up" || exit 1
case "$1" in
network) grep -q bridge=none "$RECORD.up" || echo 5fd982685957 ;;
esac
"""


def _run(folder: Path, starts_with: str, user: int = 0, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code, what it said, and which options were tried."""
    programs = {
        "docker": _DOCKER,
        "dockerd": _DOCKERD.replace("$STARTS_WITH", starts_with),
        "id": f"#!/bin/sh\necho {user}\n",
        # Nothing to wait for: these programs are done at once.
        "sleep": "#!/bin/sh\n",
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    record = folder / "record"
    ran = subprocess.run(
        ["sh", str(ROOT / "scripts" / "ensure_docker.sh")],
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "TMPDIR": str(folder),
            "RECORD": str(record),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ran.returncode, ran.stderr, record.read_text().splitlines() if record.exists() else []


def test_a_daemon_that_starts_is_enough(tmp_path: Path) -> None:
    assert _run(tmp_path, "*") == (0, "", ["dockerd "])


@pytest.mark.parametrize(
    ("environment", "code", "said_last"),
    [
        ({}, 0, "warning: {}; the tests of the Docker runtime will not run"),
        ({"RUNG_REQUIRE_DOCKER": "1"}, 1, "error: {}, and RUNG_REQUIRE_DOCKER is set"),
    ],
)
def test_without_bridges_it_runs_without_a_network_which_is_not_enough_where_it_is_required(
    tmp_path: Path, environment: dict[str, str], code: int, said_last: str
) -> None:
    found, said, tried = _run(tmp_path, "--bridge=none*", 0, **environment)

    assert found == code
    assert tried == [
        "dockerd ",
        "dockerd --storage-driver=vfs",
        "dockerd --bridge=none --iptables=false --ip6tables=false",
    ]
    assert 'dockerd does not start as it is: level=fatal msg="not permitted: "' in said
    why = "Docker runs without a bridge network: a container's port cannot be published"
    assert said.splitlines()[-1] == said_last.format(why)
    # Nor is it when it runs already.
    again, said, _ = _run(tmp_path, "never", 0, **environment)
    assert (again, said.splitlines()) == (code, [said_last.format(why)])


@pytest.mark.parametrize(
    ("environment", "code", "said_last"),
    [
        ({}, 0, "warning: dockerd does not start; the tests of the Docker runtime will not run"),
        (
            {"RUNG_REQUIRE_DOCKER": "1"},
            1,
            "error: dockerd does not start, and RUNG_REQUIRE_DOCKER is set",
        ),
    ],
)
def test_where_none_starts_it_says_why(
    tmp_path: Path, environment: dict[str, str], code: int, said_last: str
) -> None:
    found, said, tried = _run(tmp_path, "never", 0, **environment)

    assert found == code
    assert len(tried) == 4
    assert "not permitted: --storage-driver=vfs --bridge=none" in said
    assert said.splitlines()[-1] == said_last


@pytest.mark.parametrize(
    ("refuses", "said"),
    [
        ("yes", "a Docker Engine runs, but not for this user"),
        ("", "no Docker Engine runs, and only root can"),
    ],
)
def test_who_is_not_root_is_told_what_is_missing(tmp_path: Path, refuses: str, said: str) -> None:
    code, told, tried = _run(tmp_path, "*", user=1000, REFUSES=refuses)

    assert (code, tried) == (0, [])
    assert told.startswith(f"warning: {said}")
    assert _run(tmp_path, "*", user=1000, REFUSES=refuses, RUNG_REQUIRE_DOCKER="1")[0] == 1
