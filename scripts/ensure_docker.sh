#!/bin/sh
# See to it that a Docker Engine runs, for the tests of the Docker runtime: installs Debian's docker.io
# and starts its daemon by hand where nothing starts it (no systemd). Where Docker cannot run, or only
# without the bridge by which a container's port is published, it says why, and those tests are skipped;
# with RUNG_REQUIRE_DOCKER=1 that is a failure.
set -u
cd "$(dirname "$0")/.."
LOG=${TMPDIR:-/tmp}/rung-dockerd.log
WAIT_S=20
NO_NETWORK="--bridge=none --iptables=false --ip6tables=false"

running() { docker info >/dev/null 2>&1; }
bridged() { [ -n "$(docker network ls --quiet --filter driver=bridge 2>/dev/null)" ]; }

give_up() {
    if [ "${RUNG_REQUIRE_DOCKER:-}" = 1 ]; then
        echo "error: $1, and RUNG_REQUIRE_DOCKER is set" >&2
        exit 1
    fi
    echo "warning: $1; the tests of the Docker runtime will not run" >&2
    exit 0
}

# End here if a daemon answers.
end_if_running() {
    running || return 0
    bridged || give_up "Docker runs without a bridge network: a container's port cannot be published"
    exit 0
}

# Start dockerd with these options and wait until it answers; fails once it has ended, or is too late.
start() {
    # shellcheck disable=SC2086
    nohup dockerd $1 >"$LOG" 2>&1 &
    daemon=$!
    waited=0
    while [ "$waited" -lt "$WAIT_S" ] && kill -0 "$daemon" 2>/dev/null; do
        running && return 0
        sleep 1
        waited=$((waited + 1))
    done
    running && return 0
    kill "$daemon" 2>/dev/null
    wait "$daemon" 2>/dev/null
    return 1
}

why() { tail -n 1 "$LOG"; }

end_if_running
command -v dockerd >/dev/null || sh scripts/ensure_debian.sh docker.io || give_up "docker.io is not installed"
end_if_running
if [ "$(id -u)" != 0 ]; then
    case $(docker info 2>&1) in
    *"permission denied"*)
        give_up "a Docker Engine runs, but not for this user (sudo usermod -aG docker USER, then log in again)" ;;
    esac
    give_up "no Docker Engine runs, and only root can start one"
fi

# Plain first; then what sandboxes without overlayfs, or without bridges and iptables, need.
start "" && end_if_running
echo "dockerd does not start as it is: $(why)" >&2
start "--storage-driver=vfs" && end_if_running
start "$NO_NETWORK" && end_if_running
start "--storage-driver=vfs $NO_NETWORK" && end_if_running
echo "the last lines of $LOG:" >&2
tail -n 5 "$LOG" >&2
give_up "dockerd does not start"
