"""Fetch the pinned `buf` into .tools/, verified, from the npm registry, where its makers publish it.

Prints the path of the executable.
"""

from __future__ import annotations

import base64
import hashlib
import io
import platform
import sys
import tarfile
import urllib.request
from pathlib import Path

VERSION = "1.75.0"
#: Subresource integrity of the packages, as the registry publishes it.
INTEGRITY = {
    "x64": "sha512-YGGJAx0lpMCE7aMWjNOJcfoEaG/e+iYHnTC4SZ0P5eS4IffMryA9Z4/bb1m1wNXAEJ8ATFMEZOAk/5x9VE47ig==",
    "aarch64": "sha512-eX+XyokzJDqsNIFo8b1O3DBvbnksOozPJX4QVsNn61JqSUtWspyTNeYqwg8lRDancML+bDqZEDFPABjAsVCQGQ==",  # noqa: E501
}
MACHINES = {"x86_64": "x64", "aarch64": "aarch64"}


def main() -> None:
    """Download unless it is there, check, unpack."""
    machine = MACHINES.get(platform.machine())
    if platform.system() != "Linux" or machine is None:
        sys.exit(f"there is no pinned buf for {platform.system()} on {platform.machine()}")
    target = Path(__file__).resolve().parent.parent / ".tools" / f"buf-{VERSION}"
    if not target.exists():
        name = f"buf-linux-{machine}"
        url = f"https://registry.npmjs.org/@bufbuild/{name}/-/{name}-{VERSION}.tgz"
        with urllib.request.urlopen(url, timeout=120) as response:
            archive = response.read()
        digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
        if f"sha512-{digest}" != INTEGRITY[machine]:
            sys.exit(f"{url} is not what was pinned: sha512-{digest}")
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            member = tar.extractfile("package/bin/buf")
            assert member is not None
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(".part")
            partial.write_bytes(member.read())
        partial.chmod(0o755)
        partial.rename(target)
    print(target)


if __name__ == "__main__":
    main()
