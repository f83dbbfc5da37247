"""Processes by identity, from /proc: a PID alone may be somebody else by now."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

#: Environment variable that marks an engine and, by inheritance, all it starts.
MARK = "RUNG_ENGINE"
#: prctl option of Linux that makes orphans of our descendants our children.
_PR_SET_CHILD_SUBREAPER = 36


def owner_mark(node_id: str, state_dir: Path) -> str:
    """What marks an agent's engines as its own. Another agent on this machine may have the same name."""
    place = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]
    return f"{node_id}@{place}"


def boot_id() -> str:
    """Changes with every boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none, or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name may have spaces and parentheses; what follows the last one is regular.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def is_same(pid: int, ticks: int, boot: str) -> bool:
    """Whether the process that was recorded still runs."""
    return pid > 0 and boot == boot_id() and start_time_ticks(pid) == ticks


def marked(mark: str) -> Iterator[int]:
    """Processes of ours whose environment has the mark; a mark that ends in `/` stands for all below it."""
    wanted = f"{MARK}={mark}".encode()
    for pid in _all_pids():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for variable in variables:
            if variable == wanted or (mark.endswith("/") and variable.startswith(wanted)):
                if start_time_ticks(pid) is not None:
                    yield pid
                break


def mark_of(pid: int) -> str:
    """The mark of a process; empty without one."""
    return environment_of(pid).get(MARK, "")


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if it cannot be read, or there is none."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (os.fsdecode(variable).partition("=") for variable in variables if variable)
    return {name: value for name, _, value in pairs}


def descendants(pid: int) -> frozenset[int]:
    """A process and all that descend from it now."""
    children: dict[int, list[int]] = {}
    for each in _all_pids():
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(each)
    found: set[int] = set()
    pending = [pid]
    while pending:
        each = pending.pop()
        if each not in found:
            found.add(each)
            pending.extend(children.get(each, ()))
    return frozenset(found)


def session_members(leader: int, since_ticks: int) -> Iterator[int]:
    """Processes in the session that `leader` began, if they started after it; they may have no mark."""
    for pid in _all_pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX" and int(fields[3]) == leader and int(fields[19]) >= since_ticks:
            yield pid


def reap_orphans(engines: Collection[int]) -> None:
    """Reap children that have ended and are no engines: what an engine left behind came to us."""
    own = str(os.getpid())
    for pid in _all_pids():
        if pid in engines:
            continue
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z" and fields[1] == own:
                os.waitpid(pid, os.WNOHANG)


def signal_each(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal; a process that is gone meanwhile does not mind."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def become_subreaper() -> None:
    """Make orphans of our engines our children, so that they can be found and reaped.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def reap(pid: int) -> int | None:
    """The exit code of a child that has ended (negative for a signal); None if it is no child of ours."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if found == pid else None


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
