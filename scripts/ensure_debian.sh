#!/bin/sh
# Install Debian packages that are missing, as root or through sudo; says what to do where neither works.
#   ensure_debian.sh PACKAGE ...
set -eu
missing=
for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "warning: cannot install$missing: this is not a Debian or Ubuntu machine" >&2
    exit 1
fi
as_root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null && sudo -n true 2>/dev/null || {
        echo "error: these packages are missing; install them:  sudo apt-get install$missing" >&2
        exit 1
    }
    as_root=sudo
fi
echo "installing$missing"
$as_root apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null
