"""Following a generation on a terminal, and telling what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from rich.text import Text

from rung import AsyncClient, GenerationResult, GenerationStream
from rung.cli._session import Session
from rung.cli.views import format_bytes, served_name, show_phases
from rung.errors import RungError
from rung.types import JobEvent


async def follow(
    session: Session,
    client: AsyncClient,
    stream: GenerationStream,
    events: AsyncIterable[JobEvent] | None = None,
) -> GenerationResult:
    """Show a generation phase by phase, to its end. Interrupted, its job is cancelled.

    Args:
        session: where to show it.
        client: whose generation it is.
        stream: the generation; it is closed at the end.
        events: those of the stream, where somebody else reads them, too.

    Raises:
        RungError: as `GenerationStream.result`.
    """
    async with stream:
        try:
            await show_phases(stream if events is None else events, console=session.err)
            return await stream.result()
        except asyncio.CancelledError:
            # Leaving the stream would cancel it, too; this way it is known that it has been heard.
            await _cancel(session, client, stream.job_id)
            raise


async def _cancel(session: Session, client: AsyncClient, job_id: str) -> None:
    if not job_id:
        return
    with suppress(RungError):
        await client.cancel_job(job_id)
        session.err.print(Text(f"cancelled {job_id}", style="dim"))


def result_fields(result: GenerationResult, paths: Sequence[Path], name: str) -> dict[str, object]:
    """A result as JSON shows it; `name` is what its files are called there."""
    return {
        "job_id": result.job_id,
        "served": result.served,
        "usage": result.usage,
        name: [
            {"path": str(path), **msgspec.structs.asdict(file.artifact)}
            for file, path in zip(result.artifacts, paths, strict=True)
        ],
    }


def tell_result(session: Session, result: GenerationResult, paths: Sequence[Path]) -> None:
    """Say where the files are, and on stderr who made them."""
    for path in paths:
        # The name alone goes to stdout, for whoever opens it next.
        session.out.print(Text(str(path)), soft_wrap=True)
    size = format_bytes(sum(len(file.data) for file in result.artifacts))
    words = " · ".join([served_name(result.served), size, f"job {result.job_id}"])
    session.err.print(Text(words, style="dim"), soft_wrap=True)
