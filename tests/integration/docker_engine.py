"""A Docker Engine for the tests, and an image made from nothing."""

from __future__ import annotations

import io
import os
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest

IMAGE = "rung-test-empty:1"


def require_docker() -> docker.DockerClient:
    """A client, or a skip with the reason; with RUNG_REQUIRE_DOCKER=1 a failure where none answers.

    An Engine without a bridge network, which is all that some sandboxes permit, cannot publish a
    port: the runtime refuses it, and there is nothing more to be seen.
    """
    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except docker.errors.DockerException as error:
        if os.environ.get("RUNG_REQUIRE_DOCKER") == "1":
            pytest.fail(f"RUNG_REQUIRE_DOCKER is set, and no Docker Engine answers: {error}")
        pytest.skip(f"no Docker Engine answers: {error}")
    if not client.networks.list(filters={"driver": "bridge"}):
        client.close()
        pytest.skip("the Docker Engine has no bridge network, so that no port can be published")
    return client


def build_empty_image(client: docker.DockerClient) -> str:
    """An image with nothing but empty folders: what an engine needs of the machine is mounted."""
    try:
        client.images.get(IMAGE)
    except docker.errors.ImageNotFound:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for folder in ("tmp", "etc", "proc", "dev", "sys"):
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
                tar.addfile(entry)
        repository, tag = IMAGE.split(":")
        client.api.import_image_from_data(archive.getvalue(), repository=repository, tag=tag)
    return IMAGE


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
