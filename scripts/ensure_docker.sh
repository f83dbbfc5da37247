#!/bin/sh
# See to it that a Docker Engine runs, for the tests of the Docker runtime: installs Debian's docker.io
# and starts its daemon by hand where nothing starts it (no systemd). Never fails: where Docker cannot
# run it says why, and those tests are skipped (or fail, with RUNG_REQUIRE_DOCKER=1).
set -u
cd "$(dirname "$0")/.."
LOG=${TMPDIR:-/tmp}/rung-dockerd.log
WAIT_S=20

running() { docker info >/dev/null 2>&1; }

give_up() {
    echo "warning: $1; the tests of the Docker runtime will not run" >&2
    exit 0
}

running && exit 0
command -v dockerd >/dev/null || sh scripts/ensure_debian.sh docker.io || give_up "docker.io is not installed"
running && exit 0
[ "$(id -u)" = 0 ] || give_up "no Docker Engine runs, and only root can start one"

# Plain first; then what sandboxes without overlayfs or without iptables need.
for options in "" "--storage-driver=vfs" "--storage-driver=vfs --iptables=false --ip6tables=false"; do
    # shellcheck disable=SC2086
    nohup dockerd $options >"$LOG" 2>&1 &
    daemon=$!
    waited=0
    while [ "$waited" -lt "$WAIT_S" ] && kill -0 "$daemon" 2>/dev/null; do
        running && exit 0
        sleep 1
        waited=$((waited + 1))
    done
    running && exit 0
    kill "$daemon" 2>/dev/null
    wait "$daemon" 2>/dev/null
done
tail -n 3 "$LOG" >&2
give_up "dockerd did not start (its log is $LOG)"
