"""What the state of a container and the events about it come to in words."""

from __future__ import annotations

from typing import Any

import pytest

from nodeagent.runtimes._docker_state import Heard, complaint_of, how_it_ended

GIB = 1024**3


def inspected(
    *, exit_code: int = 0, status: str = "exited", out_of_memory: bool = False, memory_bytes: int = 0
) -> dict[str, Any]:
    state = {"Status": status, "ExitCode": exit_code, "OOMKilled": out_of_memory}
    return {"State": state, "HostConfig": {"Memory": memory_bytes}}


def heard(*events: tuple[str, dict[str, str]]) -> Heard:
    found = Heard()
    for action, attributes in events:
        found.note({"Action": action, "Actor": {"ID": "c", "Attributes": attributes}})
    return found


KILLED = ("kill", {"signal": "9"})
ASKED = ("kill", {"signal": "15"})
DIED = ("die", {"exitCode": "137"})
OUT_OF_MEMORY = ("oom", {"image": "engine:1"})

ENDS = {
    "by itself": (inspected(exit_code=3), heard(), 3, "ended with exit code 3"),
    "well": (inspected(), heard(), 0, "ended with exit code 0"),
    "by a signal": (inspected(exit_code=139), heard(), -11, "was ended by SIGSEGV"),
    "by a code that is no signal": (inspected(exit_code=255), heard(), 255, "ended with exit code 255"),
    "out of memory": (
        inspected(exit_code=137, out_of_memory=True, memory_bytes=2 * GIB),
        heard(),
        -9,
        "was killed by the kernel: out of memory (limit 2.0 GiB)",
    ),
    "out of memory as the event says": (
        inspected(exit_code=137, memory_bytes=64 * 1024**2),
        heard(OUT_OF_MEMORY, DIED),
        -9,
        "was killed by the kernel: out of memory (limit 64 MiB)",
    ),
    "out of the machine's memory": (
        inspected(exit_code=137, out_of_memory=True),
        heard(),
        -9,
        "was killed by the kernel: out of memory (it has no limit of its own: "
        "the machine's memory was used up)",
    ),
    "after a worker of it was out of memory": (
        inspected(exit_code=1, out_of_memory=True, memory_bytes=GIB),
        heard(),
        1,
        "ended with exit code 1 after the kernel had killed a process of it: out of memory (limit 1.0 GiB)",
    ),
    "killed by somebody": (
        inspected(exit_code=137),
        heard(KILLED, DIED),
        -9,
        "was ended by SIGKILL, which was sent through Docker",
    ),
    "stopped by somebody": (
        inspected(exit_code=0),
        heard(ASKED, ("die", {"exitCode": "0"})),
        0,
        "ended with exit code 0 after SIGTERM was sent through Docker",
    ),
    "by another signal than was sent": (
        inspected(exit_code=139),
        heard(ASKED),
        -11,
        "was ended by SIGSEGV",
    ),
    "seen last while it ran": (
        inspected(status="running"),
        heard(("die", {"exitCode": "2"})),
        2,
        "ended with exit code 2",
    ),
    "never seen": (None, heard(), None, "ended"),
    "after an earlier life": (
        inspected(exit_code=137),
        heard(OUT_OF_MEMORY, KILLED, DIED, ("start", {})),
        -9,
        "was ended by SIGKILL",
    ),
    "told by a daemon that says little": (
        inspected(exit_code=4),
        heard(("kill", {}), ("die", {"exitCode": ""}), ("exec_die", {"exitCode": "9"})),
        4,
        "ended with exit code 4",
    ),
}


@pytest.mark.parametrize(("attributes", "events", "code", "detail"), ENDS.values(), ids=ENDS.keys())
def test_how_a_container_ended_is_told_with_its_cause(
    attributes: dict[str, Any] | None, events: Heard, code: int | None, detail: str
) -> None:
    assert how_it_ended(attributes, events) == (code, detail)


COMPLAINTS: dict[str, tuple[dict[str, Any], str]] = {
    "no healthcheck": ({}, ""),
    "not yet known": ({"Health": {"Status": "starting", "Log": []}}, ""),
    "well": ({"Health": {"Status": "healthy", "Log": [{"Output": "fine"}]}}, ""),
    "unwell": (
        {"Health": {"Status": "unhealthy", "Log": [{"Output": "old"}, {"Output": "0%\nno model \n\n"}]}},
        "its HEALTHCHECK fails: no model",
    ),
    "unwell without a word": (
        {"Health": {"Status": "unhealthy", "Log": [{"Output": ""}]}},
        "its HEALTHCHECK fails",
    ),
    "unwell without a log": ({"Health": {"Status": "unhealthy", "Log": None}}, "its HEALTHCHECK fails"),
    "unwell with a flood of words": (
        {"Health": {"Status": "unhealthy", "Log": [{"Output": "x" * 4096}]}},
        "its HEALTHCHECK fails: " + "x" * 200,
    ),
}


@pytest.mark.parametrize(("state", "complaint"), COMPLAINTS.values(), ids=COMPLAINTS.keys())
def test_a_healthcheck_is_told_of_while_it_fails(state: dict[str, Any], complaint: str) -> None:
    assert complaint_of({"State": state}) == complaint
