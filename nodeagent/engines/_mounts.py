"""Paths of the node as an engine in a container sees them."""

from __future__ import annotations

from pathlib import PurePosixPath

from rung.types import DockerRuntime, Runtime


def seen_by_engine(path: str, runtime: Runtime) -> str:
    """A path of the node as the engine sees it: in a container, through the innermost mount that has it."""
    if not isinstance(runtime, DockerRuntime):
        return path
    wanted = PurePosixPath(path)
    inside = [mount for mount in runtime.mounts if wanted.is_relative_to(mount.source)]
    if not inside:
        # A file of the image itself.
        return path
    mount = max(inside, key=lambda mount: len(PurePosixPath(mount.source).parts))
    return str(PurePosixPath(mount.target) / wanted.relative_to(mount.source))
