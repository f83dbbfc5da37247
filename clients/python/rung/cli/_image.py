"""`rung image`: a picture from a prompt, with everything that happens until it is there."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.text import Text

from rung import AsyncClient, GenerationResult, ImageInput, Policy
from rung.cli._files import Output, read_picture
from rung.cli._generating import follow, result_fields, tell_result
from rung.cli._models import Json
from rung.cli._session import Session, session_of
from rung.types import ArtifactChunk, JobEvent, Priority

_SIZE = re.compile(r"(\d{2,5})[xX](\d{2,5})")
_WHAT = "What is drawn"
_WHERE = "Where it is drawn"
_RESULT = "What comes of it"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(image)


def image(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to draw.")] = "",
    tier: Annotated[
        str,
        typer.Option("--tier", "-t", help="lightning, quality or ultra; empty lets effort decide."),
    ] = "",
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File or folder to write to, - for stdout; empty makes a name of the prompt.",
            rich_help_panel=_RESULT,
        ),
    ] = "",
    size: Annotated[
        str,
        typer.Option(metavar="WxH", help="In pixels; empty takes the tier's own.", rich_help_panel=_WHAT),
    ] = "",
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed draws the same.", rich_help_panel=_WHAT)
    ] = None,
    negative: Annotated[str, typer.Option(help="What not to draw.", rich_help_panel=_WHAT)] = "",
    operation: Annotated[
        str,
        typer.Option(
            help="Workflow: generate, img2img, inpaint, upscale …; empty fits what is given.",
            rich_help_panel=_WHAT,
        ),
    ] = "",
    images: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", metavar="FILE", help="To start from.", rich_help_panel=_WHAT),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="White where to draw anew.", rich_help_panel=_WHAT)
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "--param", "-p", metavar="NAME=VALUE", help="Parameter of the workflow.", rich_help_panel=_WHAT
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, max=16, help="How many.", rich_help_panel=_WHAT)
    ] = 1,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from `rung models`.", rich_help_panel=_WHERE)
    ] = "",
    effort: Annotated[
        int | None,
        typer.Option("--effort", "-e", min=1, max=10, help="1 to 10.", rich_help_panel=_WHERE),
    ] = None,
    local_only: Annotated[
        bool, typer.Option("--local-only", help="Never leave your own hardware.", rich_help_panel=_WHERE)
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep what is there so far in this file while it is drawn.",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Overwrite files.", rich_help_panel=_RESULT)
    ] = False,
    detach: Annotated[
        bool,
        typer.Option("--detach", "-d", help="Print the job's id and leave it be.", rich_help_panel=_RESULT),
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw a picture; a line for each phase says what happens, since when, and how much longer.

    Progress goes to stderr. Ctrl-C cancels the job. What is there already is not overwritten.

    Examples: rung image 'a cat in the rain' --tier quality -o cat.png

    rung image 'a red hat' --image cat.png --mask head.png --param denoise=0.8
    """
    session = session_of(context)
    pictures = [read_picture(path) for path in images or ()]
    if mask is not None:
        if not pictures:
            raise typer.BadParameter("a mask is of a picture: give --image, too")
        pictures.append(read_picture(mask))
    if not prompt.strip() and not pictures:
        raise typer.BadParameter("there is nothing to draw: the prompt is empty")
    width, height = _read_size(size)
    wanted = ImageInput(
        prompt=prompt,
        negative_prompt=negative,
        operation=operation or _fitting_operation(len(pictures), masked=mask is not None),
        tier=tier,
        width_pixels=width,
        height_pixels=height,
        seed=seed,
        images=tuple(pictures),
        parameters=_read_parameters(parameters or ()),
        count=count,
        previews=preview is not None,
    )
    target = Output(path=output, words=prompt or operation or "image", force=force)
    if target.is_stdout and (as_json or sys.stdout.isatty()):
        raise typer.BadParameter("pictures go to stdout when that is a pipe or a file, and without --json")
    policy = Policy(local_only=local_only, priority=Priority.USER)
    if detach:
        job = session.run(
            lambda client: client.create_job(wanted=wanted, model=model, effort=effort, policy=policy)
        )
        if as_json:
            session.print_json(job)
        else:
            session.out.print(Text(job.id))
            session.err.print(Text(f"`rung jobs watch {job.id}` shows how far it is", style="dim"))
        return
    target.check(count)
    result = session.run(lambda client: _draw(session, client, wanted, model, effort, policy, preview))
    paths = target.save(result.artifacts, sys.stdout.buffer)
    if as_json:
        session.print_json(result_fields(result, paths, "images"))
    else:
        tell_result(session, result, paths)


async def _draw(
    session: Session,
    client: AsyncClient,
    wanted: ImageInput,
    model: str,
    effort: int | None,
    policy: Policy,
    preview: Path | None,
) -> GenerationResult:
    stream = client.generate(wanted, model=model, effort=effort, policy=policy)
    async with aclosing(_with_previews(stream, preview)) as events:
        return await follow(session, client, stream, events)


async def _with_previews(
    events: AsyncIterator[JobEvent], path: Path | None
) -> AsyncGenerator[JobEvent, None]:
    """The events; the newest preview among them is in the file."""
    async for event in events:
        match event.payload:
            case ArtifactChunk(preview=True, data=data) if data and path is not None:
                await asyncio.to_thread(_replace, path, data)
            case _:
                pass
        yield event


def _replace(path: Path, data: bytes) -> None:
    # Whoever shows the file never sees half of it.
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def _fitting_operation(pictures: int, *, masked: bool) -> str:
    if masked:
        return "inpaint"
    return "img2img" if pictures else "generate"


def _read_size(text: str) -> tuple[int, int]:
    if not text:
        return 0, 0
    found = _SIZE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size; write it as 1024x768")
    return int(found[1]), int(found[2])


def _read_parameters(texts: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE`, each value as JSON where it is some, and as a text where not."""
    parameters: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is no parameter; write it as NAME=VALUE")
        try:
            parameters[name] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            parameters[name] = value
    return parameters
