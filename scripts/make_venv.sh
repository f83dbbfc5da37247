#!/bin/sh
# Make .venv and install what the lock file pins. Needs python3 only: on a Debian or Ubuntu machine
# whose python3 comes without venv, the package with it is installed first.
#   make_venv.sh [GROUP ...]     dependency groups of pyproject.toml
set -eu
cd "$(dirname "$0")/.."
UV_VERSION=0.13.8
PYTHON=${PYTHON:-python3}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Rung needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version). Set PYTHON=…" >&2
    exit 1
}
if ! "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
    sh scripts/ensure_debian.sh python3-venv
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
if [ "$(.venv/bin/uv --version 2>/dev/null | cut -d' ' -f2)" != "$UV_VERSION" ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
fi
groups=
for group in "$@"; do groups="$groups --group $group"; done
# --inexact keeps uv itself, which is not in the lock file.
# shellcheck disable=SC2086
VIRTUAL_ENV="$PWD/.venv" .venv/bin/uv sync --quiet --frozen --inexact --no-default-groups $groups
