"""`rung speak` and `rung transcribe`: from text to audio, and back."""

from __future__ import annotations

import mimetypes
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rung import AsyncClient, GenerationResult, Policy
from rung.cli._files import STDOUT, Output
from rung.cli._generating import follow, result_fields, tell_result
from rung.cli._models import Json
from rung.cli._session import Session, session_of
from rung.cli.views import Answer, print_answer
from rung.types import Priority, TranscriptionInput

_FORMATS = ("wav", "mp3", "flac", "opus", "aac", "pcm")
_TEXT = "text"
_FILES = ("verbose_json", "srt", "vtt")
#: What is told apart by its first bytes; the rest by its name.
_MAGIC = (
    (b"ID3", "audio/mpeg"),
    (b"\xff\xfb", "audio/mpeg"),
    (b"fLaC", "audio/flac"),
    (b"OggS", "audio/ogg"),
    (b"\x1aE\xdf\xa3", "audio/webm"),
)

Model = Annotated[str, typer.Option("--model", "-m", help="A name from `rung models`.")]
LocalOnly = Annotated[bool, typer.Option("--local-only", help="Never leave your own hardware.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite files.")]
OutputPath = Annotated[
    str,
    typer.Option(
        "--output", "-o", metavar="FILE", help="File or folder to write to, - for stdout; empty makes a name."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(speak)
    app.command()(transcribe)


def speak(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="What to say; without it, stdin is read.")] = "",
    output: OutputPath = "",
    voice: Annotated[str, typer.Option("--voice", "-v", help="Its name; empty for the engine's own.")] = "",
    form: Annotated[
        str,
        typer.Option(
            "--format", metavar="|".join(_FORMATS), help="Of the audio; empty takes it from the file's name."
        ),
    ] = "",
    speed: Annotated[float, typer.Option(min=0.25, max=4.0, help="1 is as usual.")] = 1.0,
    language: Annotated[str, typer.Option(help="Such as de, for engines that have to be told.")] = "",
    model: Model = "",
    local_only: LocalOnly = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Have a text spoken, and keep the audio in a file. Nothing is played.

    Progress goes to stderr. Ctrl-C cancels the job. What is there already is not overwritten.

    Examples: rung speak 'Hello' -o hello.wav

    fortune | rung speak -o - | aplay
    """
    session = session_of(context)
    if not text and not sys.stdin.isatty():
        text = sys.stdin.read()
    if not text.strip():
        raise typer.BadParameter("there is nothing to say: give a text, or pipe one in")
    ending = Path(output).suffix.removeprefix(".").lower()
    form = form or (ending if ending in _FORMATS else "wav")
    if form not in _FORMATS:
        raise typer.BadParameter(f"--format is {form!r}; it must be one of {', '.join(_FORMATS)}")
    target = Output(path=output, words=text, force=force)
    if target.is_stdout and (as_json or sys.stdout.isatty()):
        raise typer.BadParameter("audio goes to stdout when that is a pipe or a file, and without --json")
    target.check(1)

    async def make(client: AsyncClient) -> GenerationResult:
        stream = client.speak(
            text,
            voice=voice,
            format=form,
            speed=speed,
            language=language,
            model=model,
            policy=Policy(local_only=local_only, priority=Priority.USER),
        )
        return await follow(session, client, stream)

    _keep(session, session.run(make), target, "audio", as_json=as_json)


def transcribe(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recording; - for stdin.")],
    output: OutputPath = STDOUT,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join((_TEXT, *_FILES)),
            help="Text as it is heard, or a file with times.",
        ),
    ] = _TEXT,
    language: Annotated[str, typer.Option(help="Such as de; empty to detect it.")] = "",
    prompt: Annotated[str, typer.Option(help="Text that came before, or words to expect.")] = "",
    translate: Annotated[bool, typer.Option("--translate", help="Into English.")] = False,
    model: Model = "",
    local_only: LocalOnly = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write down what is said in a recording.

    The text goes to stdout as it is heard, and nothing else does: progress goes to stderr.

    Examples: rung transcribe memo.wav

    rung transcribe film.mp3 --format srt -o film.srt
    """
    session = session_of(context)
    if form not in (_TEXT, *_FILES):
        raise typer.BadParameter(f"--format is {form!r}; it must be one of {', '.join((_TEXT, *_FILES))}")
    if form == _TEXT and output != STDOUT:
        raise typer.BadParameter("text goes to stdout: `rung transcribe FILE > FILE.txt`; -o is for files")
    audio = _read(file)
    wanted = TranscriptionInput(
        audio=audio,
        content_type=_media_type(file, audio),
        language=language,
        prompt=prompt,
        format=form,
        translate=translate,
    )
    policy = Policy(local_only=local_only, priority=Priority.USER)
    if form == _TEXT and not as_json:
        answer = session.run(lambda client: _hear(session, client, wanted, model, policy))
        session.err.print(Text(answer.summary(), style="dim"), soft_wrap=True)
        return
    target = Output(path=output, words=file.stem, force=force)
    target.check(1)

    async def make(client: AsyncClient) -> GenerationResult:
        return await follow(session, client, client.generate(wanted, model=model, policy=policy))

    result = session.run(make)
    if form == _TEXT or (as_json and target.is_stdout):
        text = result.text or b"".join(each.data for each in result.artifacts).decode()
        session.print_json({"job_id": result.job_id, "served": result.served, "text": text})
        return
    _keep(session, result, target, "files", as_json=as_json)


async def _hear(
    session: Session, client: AsyncClient, wanted: TranscriptionInput, model: str, policy: Policy
) -> Answer:
    stream = client.generate(wanted, model=model, policy=policy)
    async with stream:
        return await print_answer(stream, out=session.out, err=session.err)


def _keep(session: Session, result: GenerationResult, target: Output, name: str, *, as_json: bool) -> None:
    paths = target.save(result.artifacts, sys.stdout.buffer)
    if as_json:
        session.print_json(result_fields(result, paths, name))
    else:
        tell_result(session, result, paths)


def _read(file: Path) -> bytes:
    """A recording. Raises typer.BadParameter: there is none."""
    try:
        audio = sys.stdin.buffer.read() if str(file) == STDOUT else file.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from None
    if not audio:
        raise typer.BadParameter(f"{file} is empty")
    return audio


def _media_type(file: Path, audio: bytes) -> str:
    if audio[:4] == b"RIFF" and audio[8:12] == b"WAVE":
        return "audio/wav"
    for magic, content_type in _MAGIC:
        if audio.startswith(magic):
            return content_type
    return mimetypes.guess_type(file.name)[0] or "application/octet-stream"
