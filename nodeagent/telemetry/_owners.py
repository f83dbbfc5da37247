"""Whose a process on a GPU is.

An engine's process seldom holds the GPU itself: vLLM's worker is a child, a container's engine is a
grandchild. So a process belongs to the nearest known process above it, or to the leader of its
session, since engines that we start as processes lead one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from rung.types import Gpu, GpuProcess

#: No chain of parents is longer than this, unless pids are reused under our eyes.
_MAX_DEPTH = 64


class Kin(Struct, frozen=True):
    """The parent of a process and the leader of its session."""

    parent: int
    session: int


def kin_of(pid: int) -> Kin | None:
    """Parent and session of a process, or None if it is gone or of another PID namespace."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command, in brackets, may itself hold spaces and brackets.
    fields = stat[stat.rindex(")") + 2 :].split()
    return Kin(parent=int(fields[1]), session=int(fields[3]))


def deployment_of(pid: int, owners: Mapping[int, str], find_kin: Callable[[int], Kin | None] = kin_of) -> str:
    """The deployment that a process belongs to, "" if none. `owners` maps pids to deployments."""
    current = pid
    session = 0
    for _ in range(_MAX_DEPTH):
        if current in owners:
            return owners[current]
        kin = find_kin(current)
        if kin is None:
            break
        # The session of the process itself: its parents' may be the agent's.
        session = session or kin.session
        current = kin.parent
    return owners.get(session, "")


def with_owners(
    gpus: tuple[Gpu, ...], owners: Mapping[int, str], find_kin: Callable[[int], Kin | None] = kin_of
) -> tuple[Gpu, ...]:
    """The same GPUs, each process with its deployment."""
    if not owners or not any(gpu.processes for gpu in gpus):
        return gpus
    return tuple(
        msgspec.structs.replace(
            gpu, processes=tuple(_owned(found, owners, find_kin) for found in gpu.processes)
        )
        for gpu in gpus
    )


def _owned(
    process: GpuProcess, owners: Mapping[int, str], find_kin: Callable[[int], Kin | None]
) -> GpuProcess:
    return msgspec.structs.replace(process, deployment_id=deployment_of(process.pid, owners, find_kin))
