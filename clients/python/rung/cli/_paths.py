"""Where things are kept on this box."""

from __future__ import annotations

import os
from pathlib import Path


def default_state_dir() -> Path:
    """Where `rung up` keeps state and logs."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "rung"
