"""The demo's ladder, the simulated cloud API behind it, and the profiles that take the workstation away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: What the simulated cloud API wants; it opens nothing else.
CLOUD_KEY = "sk-simulated-for-the-demo"
#: Whose dialect the simulated cloud API speaks.
CLOUD_PROVIDER = "deepseek"
#: The workstation's card is somebody else's, but for what is pinned.
GAMING = "gaming"
#: Everything may be used again.
HOME = "home"
_CLOUD_MODEL = "reasoner"


def cloud_provider(base_url: str, key_path: Path) -> dict[str, Any]:
    """The cloud API, at example prices."""
    model = {
        "id": _CLOUD_MODEL,
        "model": "deepseek-reasoner",
        "capabilities": ["chat", "reasoning"],
        "context_tokens": 131072,
        "max_output_tokens": 4096,
        "usd_per_million_prompt_tokens": 0.28,
        "usd_per_million_completion_tokens": 0.42,
    }
    return {
        "id": CLOUD_PROVIDER,
        "base_url": base_url,
        "api_key_file": str(key_path),
        "daily_cap_usd": 1.0,
        "models": [model],
    }


def ladder(orchestrator: str, reasoners: Sequence[str]) -> dict[str, Any]:
    """Efforts 1 to 6 are the orchestrator's; from 7 on it may hand a problem to those who reason.

    Args:
        orchestrator: target that answers.
        reasoners: targets of ours behind the `reason` tool, best first; the cloud comes after them.
    """
    return {
        "chains": {
            "chat": [orchestrator],
            "reasoning": [*reasoners, f"{CLOUD_PROVIDER}/{_CLOUD_MODEL}"],
        },
        "rungs": [
            {"name": "chat", "effort": "1-6", "chain": "chat"},
            {
                "name": "reasoning",
                "effort": "7-10",
                "chain": "chat",
                "capabilities": ["tools"],
                "reason": "reasoning",
            },
        ],
    }


def profiles(orchestrator: str) -> list[dict[str, Any]]:
    """One that takes the workstation away from all but the orchestrator, and one that gives it back."""
    stays = [{"deployment": orchestrator, "residency": "awake"}]
    return [
        {"name": GAMING, "deployments": stays, "others": "stopped", "hold": True},
        {"name": HOME, "deployments": stays},
    ]
