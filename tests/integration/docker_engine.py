"""A Docker Engine for the tests, and an image made from nothing."""

from __future__ import annotations

import io
import os
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Any, NoReturn

import docker
import docker.errors
import pytest

IMAGE = "rung-test-empty:1"
#: The same, whose HEALTHCHECK wants a file `/out/well`.
CHECKED_IMAGE = "rung-test-checked:1"
_HEALTHCHECK = (
    "HEALTHCHECK --interval=500ms --retries=1 "
    'CMD ["/usr/bin/sh", "-c", "test -e /out/well || { echo no model yet; exit 1; }"]'
)


def require_docker() -> docker.DockerClient:
    """A client of an Engine that can publish a port; else a skip, with RUNG_REQUIRE_DOCKER=1 a failure.

    An Engine without a bridge network, which is all that some sandboxes permit, cannot publish a
    port: the runtime refuses it, and there is nothing more to be seen.
    """
    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except docker.errors.DockerException as error:
        _do_without(f"no Docker Engine answers: {error}")
    if not client.networks.list(filters={"driver": "bridge"}):
        client.close()
        _do_without("the Docker Engine has no bridge network, so that no port can be published")
    return client


def _do_without(why: str) -> NoReturn:
    if os.environ.get("RUNG_REQUIRE_DOCKER") == "1":
        pytest.fail(f"{why}; and RUNG_REQUIRE_DOCKER is set")
    pytest.skip(why)


def build_empty_image(client: docker.DockerClient) -> str:
    """An image with nothing but empty folders: what an engine needs of the machine is mounted."""
    return _import_image(client, IMAGE, [])


def build_checked_image(client: docker.DockerClient) -> str:
    """An empty image with a HEALTHCHECK."""
    return _import_image(client, CHECKED_IMAGE, [_HEALTHCHECK])


def _import_image(client: docker.DockerClient, image: str, changes: list[str]) -> str:
    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for folder in ("tmp", "etc", "proc", "dev", "sys"):
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
                tar.addfile(entry)
        repository, tag = image.split(":")
        client.api.import_image_from_data(
            archive.getvalue(), repository=repository, tag=tag, changes=changes or None
        )
    return image


def python_runtime(*mounts: Path) -> dict[str, Any]:
    """A Docker runtime that has this machine's Python, read-only, in an empty image."""
    folders = {
        Path("/usr"),
        Path("/lib"),
        Path("/lib64"),
        Path(sys.base_prefix),
        Path(sys.prefix),
        Path(sysconfig.get_path("stdlib")),
        *mounts,
    }
    present = sorted(folder for folder in folders if folder.exists())
    return {
        "kind": "docker",
        "image": IMAGE,
        "mounts": [{"source": str(folder.resolve()), "target": str(folder)} for folder in present],
        "environment": {"PATH": "/usr/bin", "HOME": "/tmp"},
    }


def permitted_mounts() -> list[str]:
    """Everything, for a test's agent."""
    return ["/"]
