"""Taking one prompt back from ComfyUI, and no other."""

from __future__ import annotations

import asyncio

import structlog

from nodeagent.engines._comfyui_http import ComfyUiHttp
from rung.errors import RungError

_log = structlog.get_logger("rung.agent")


async def stop_prompt(
    base_url: str, what: str, *, prompt_id: str, client_id: str, patience_s: float, pause_s: float
) -> None:
    """Stop a prompt wherever it is, and return once it is gone, or the patience is over. Never raises.

    A prompt stops at its next step, or its next node: what loads a model or decodes is not interrupted. It
    is told again each time that it is seen running, since ComfyUI forgets what it was told between taking a
    prompt and beginning with it.

    Args:
        base_url: where ComfyUI listens.
        what: name of the deployment.
        prompt_id: as we called it.
        client_id: whom it tells; very old versions make ids of prompts themselves.
        patience_s: how long this may take.
        pause_s: between two looks at it.
    """
    try:
        async with asyncio.timeout(patience_s), ComfyUiHttp(base_url, what) as http:
            # It does nothing to one that runs.
            await http.take_out(prompt_id)
            while True:
                place = await http.place(prompt_id, client_id)
                if place.ahead is None:
                    return
                if not place.running:
                    await http.take_out(place.prompt_id)
                elif not await http.cancel_job(place.prompt_id):
                    # Older versions stop whatever runs: it has to be this one directly before.
                    now = await http.place(prompt_id, client_id)
                    if now.running:
                        await http.interrupt(now.prompt_id)
                await asyncio.sleep(pause_s)
    except TimeoutError:
        _log.warning("comfyui_prompt_goes_on", deployment=what, prompt=prompt_id, waited_s=patience_s)
    except RungError as error:
        _log.warning("comfyui_prompt_not_stopped", deployment=what, prompt=prompt_id, error=error.message)
