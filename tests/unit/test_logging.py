"""Logs: what must never be in them."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import sys, structlog
from rung.service import configure_logging
configure_logging(form=sys.argv[1])
def ask(api_key):
    raise ValueError("it went wrong")
try:
    ask("sk-" + "secret" * 4)
except ValueError as error:
    structlog.get_logger("x").error("failed", exc_info=error, api_key="sk-" + "secret" * 4)
"""


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_no_values_and_a_key_no_key(form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, form], capture_output=True, text=True, timeout=60, check=True
    )

    assert "it went wrong" in done.stderr
    assert "secretsecret" not in done.stderr
