"""The memory of a script's models, held under leases of a control plane that is near."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeAlias

from rung._sync_client import Client
from rung.errors import UnavailableError
from rung.types import Priority

_log = logging.getLogger("rung.local")

#: Whether the lease of a context has ended although nobody gave it back.
Lost: TypeAlias = Callable[[], bool]


class LeaseSource(Protocol):
    """Holds memory for a model."""

    def __call__(self, vram_bytes: int, holder: str) -> AbstractContextManager[Lost]:
        """Wait for the memory, and hold it while the context lasts.

        Raises:
            VramInfeasibleError: it cannot be had.
        """
        ...


def leases_of(
    client: Client, gpu: str, *, priority: Priority = Priority.AGENT, required: bool = False
) -> LeaseSource:
    """Leases of a GPU from a control plane.

    Args:
        client: to the control plane.
        gpu: such as `workstation/0`.
        priority: order among the demands for that GPU.
        required: fail without a control plane, instead of going on without leases.
    """

    @contextmanager
    def hold(vram_bytes: int, holder: str) -> Iterator[Lost]:
        lease = client.lease(gpu, vram_bytes, priority=priority, holder=holder)
        try:
            holding = lease.__enter__()
        except UnavailableError as error:
            if required:
                raise
            _log.warning("no lease for %s: %s", holder, error.message)
            yield _never
            return
        try:
            yield holding.lost.is_set
        finally:
            lease.__exit__(None, None, None)

    return hold


def _never() -> bool:
    return False
