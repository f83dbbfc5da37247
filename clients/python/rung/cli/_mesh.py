"""`rung mesh`: a 3D mesh of a picture or of words, with everything that happens until it is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rung import AsyncClient, GenerationResult, Policy
from rung.cli._files import Output, read_picture
from rung.cli._generating import follow, result_fields, tell_result
from rung.cli._models import Json
from rung.cli._session import session_of
from rung.types import MeshInput, Priority

_WHAT = "What is modelled"
_WHERE = "Where it is modelled"
_RESULT = "What comes of it"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(mesh)


def mesh(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to model; a picture of it is drawn first.")] = "",
    image: Annotated[
        Path | None,
        typer.Option("--image", "-i", metavar="FILE", help="Picture to model.", rich_help_panel=_WHAT),
    ] = None,
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
    texture: Annotated[
        bool, typer.Option("--texture", "-t", help="Paint it, too.", rich_help_panel=_WHAT)
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="The same seed may model the same.", rich_help_panel=_WHAT),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from `rung models`.", rich_help_panel=_WHERE)
    ] = "",
    effort: Annotated[
        int | None,
        typer.Option(
            "--effort", "-e", min=1, max=10, help="1 to 10, of the picture.", rich_help_panel=_WHERE
        ),
    ] = None,
    local_only: Annotated[
        bool, typer.Option("--local-only", help="Never leave your own hardware.", rich_help_panel=_WHERE)
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Overwrite files.", rich_help_panel=_RESULT)
    ] = False,
    detach: Annotated[
        bool,
        typer.Option("--detach", "-d", help="Print the job's id and leave it be.", rich_help_panel=_RESULT),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a 3D mesh (GLB) of a picture, or of words by way of a picture that is drawn first.

    Progress goes to stderr. Ctrl-C cancels the job. What is there already is not overwritten.

    Examples: rung mesh 'a chair' -o chair.glb

    rung mesh --image chair.png --texture -o chair.glb
    """
    session = session_of(context)
    if image is None and not prompt.strip():
        raise typer.BadParameter("there is nothing to model: give a prompt, or --image")
    if image is not None and prompt.strip():
        raise typer.BadParameter("give a prompt or --image, not both: a picture is modelled as it is")
    wanted = MeshInput(
        prompt=prompt, image=None if image is None else read_picture(image), seed=seed, texture=texture
    )
    target = Output(path=output, words=prompt or (image.stem if image is not None else ""), force=force)
    if target.is_stdout and (as_json or sys.stdout.isatty()):
        raise typer.BadParameter("a mesh goes to stdout when that is a pipe or a file, and without --json")
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
    target.check(1)

    async def make(client: AsyncClient) -> GenerationResult:
        return await follow(
            session, client, client.generate(wanted, model=model, effort=effort, policy=policy)
        )

    result = session.run(make)
    paths = target.save(result.artifacts, sys.stdout.buffer)
    if as_json:
        session.print_json(result_fields(result, paths, "meshes"))
    else:
        tell_result(session, result, paths)
