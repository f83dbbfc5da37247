"""What this machine's owner permits the agent to run. A control plane cannot widen it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import Struct

from rung.errors import NotAllowedError
from rung.types import DockerRuntime, ProcessRuntime


class AllowedExecutable(Struct, frozen=True, kw_only=True):
    """An executable by name: its path, arguments that come first, and environment that is always set."""

    path: str
    arguments_prefix: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    allow_arguments: bool = False
    allow_environment: bool = False


class AllowList(Struct, frozen=True, kw_only=True):
    """Executables by name, images (exact, or with `*`), and folders below which containers may mount."""

    executables: dict[str, AllowedExecutable] = {}
    images: tuple[str, ...] = ()
    mount_folders: tuple[Path, ...] = ()

    def executable(self, runtime: ProcessRuntime) -> AllowedExecutable:
        """The executable that a spec names.

        Raises:
            NotAllowedError: it is not on the list, or the spec adds what the list does not permit.
        """
        name = runtime.executable
        allowed = self.executables.get(name)
        if allowed is None:
            known = ", ".join(sorted(self.executables)) or "none"
            raise NotAllowedError(
                f"this node's agent may not run {name!r}; it may run: {known}. "
                f"Add it under `executables` in the agent's configuration",
                executable=name,
            )
        if runtime.arguments and not allowed.allow_arguments:
            raise NotAllowedError(
                f"{name} may not be given further arguments; "
                f"set executables.{name}.allow_arguments in the agent's configuration",
                executable=name,
            )
        if runtime.environment and not allowed.allow_environment:
            raise NotAllowedError(
                f"{name} may not be given further environment; "
                f"set executables.{name}.allow_environment in the agent's configuration",
                executable=name,
            )
        return allowed

    def check_docker(self, runtime: DockerRuntime) -> None:
        """Refuse an image or a mount that is not on the list. Raises NotAllowedError."""
        if not any(fnmatchcase(runtime.image, allowed) for allowed in self.images):
            raise NotAllowedError(
                f"this node's agent may not run the image {runtime.image}; "
                "add it under `images` in the agent's configuration",
                image=runtime.image,
            )
        for mount in runtime.mounts:
            # Links are followed first: a link in a permitted folder may lead out of it.
            source = Path(mount.source).resolve()
            if not any(source.is_relative_to(folder.resolve()) for folder in self.mount_folders):
                raise NotAllowedError(
                    f"this node's agent may not mount {mount.source}; "
                    "add a folder above it under `mount_folders` in the agent's configuration",
                    path=mount.source,
                )
