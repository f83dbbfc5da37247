"""`rung chat`: one answer, or a conversation."""

from __future__ import annotations

import asyncio
import importlib
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from msgspec import Struct
from rich.text import Text

from rung import AsyncClient, ChatMessage, Policy
from rung.cli._failures import ExitCode, failure_of, is_unreachable
from rung.cli._files import read_picture
from rung.cli._session import Session, session_of
from rung.cli.views import Answer, print_answer
from rung.errors import RungError
from rung.types import Priority

_HELP = "/new forgets the conversation, /exit (or Ctrl-D) leaves; Ctrl-C ends an answer."


class ChatOptions(Struct, frozen=True, kw_only=True):
    """How to ask."""

    model: str
    effort: int | None
    local_only: bool
    max_tokens: int | None
    temperature: float | None


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(chat)


def chat(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; without it, a conversation starts (or stdin is read).")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from `rung models`; empty leaves the choice.")
    ] = "",
    effort: Annotated[
        int | None, typer.Option("--effort", "-e", min=1, max=10, help="How hard to think, 1 to 10.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", metavar="FILE", help="Show a picture; may be repeated."),
    ] = None,
    system: Annotated[str, typer.Option("--system", "-s", help="Instructions for the model.")] = "",
    local_only: Annotated[bool, typer.Option("--local-only", help="Never leave your own hardware.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to produce.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="Of sampling.")] = None,
) -> None:
    """Ask a model; the answer comes token by token.

    The answer goes to stdout and nothing else does: progress, thoughts and the closing line (who
    answered, how fast) go to stderr.

    Examples: rung chat 'Why is the sky blue?'

    git diff | rung chat --effort 7 'Review this change'

    rung chat 'What is on it?' --image receipt.jpg
    """
    session = session_of(context)
    options = ChatOptions(
        model=model, effort=effort, local_only=local_only, max_tokens=max_tokens, temperature=temperature
    )
    messages = [ChatMessage("system", system)] if system else []
    pictures = tuple(read_picture(path) for path in images or ())
    question = _question(prompt)
    if question is None:
        if pictures:
            raise typer.BadParameter("a picture is shown with a prompt: say what to ask of it")
        _converse(session, options, messages)
        return
    if not question.strip():
        raise typer.BadParameter("there is nothing to ask: the prompt is empty")
    messages.append(ChatMessage("user", question, images=pictures))
    session.run(lambda client: _ask(session, client, options, messages))


def _question(prompt: str | None) -> str | None:
    """What to ask: what is piped in, then the prompt; None if a person is to be asked."""
    if sys.stdin is None or sys.stdin.isatty() or (prompt is not None and not _is_piped()):
        return prompt
    piped = sys.stdin.read()
    if prompt is None or not piped.strip():
        return piped if prompt is None else prompt
    return f"{piped.rstrip()}\n\n{prompt}"


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file. A service's socket or /dev/null adds nothing to a prompt."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        # A stand-in for a file, which holds something.
        return True
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


async def _ask(
    session: Session, client: AsyncClient, options: ChatOptions, messages: list[ChatMessage]
) -> Answer:
    stream = client.chat(
        tuple(messages),
        model=options.model,
        effort=options.effort,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        policy=Policy(local_only=options.local_only, priority=Priority.USER),
    )
    async with stream:
        answer = await print_answer(stream, out=session.out, err=session.err)
    session.err.print(Text(answer.summary(), style="dim"), soft_wrap=True)
    return answer


def _converse(session: Session, options: ChatOptions, messages: list[ChatMessage]) -> None:
    """Ask and answer until the person leaves; failures end a turn, not the conversation."""
    with suppress(ImportError):
        # Line editing and history for `input`.
        importlib.import_module("readline")
    session.err.print(Text(_HELP, style="dim"))
    first = list(messages)
    with asyncio.Runner() as runner:
        client = session.client()
        try:
            while (said := _read_line(session)) is not None:
                if said == "/new":
                    messages[:] = first
                    continue
                turn = [*messages, ChatMessage("user", said)]
                try:
                    answer = runner.run(_ask(session, client, options, turn))
                except KeyboardInterrupt:
                    session.err.print(Text("cancelled", style="dim"))
                    continue
                except RungError as error:
                    _tell(session, error)
                    continue
                messages[:] = [*turn, ChatMessage("assistant", answer.text)]
        finally:
            runner.run(client.aclose())


def _read_line(session: Session) -> str | None:
    """The next thing that the person says; None when they leave."""
    while True:
        try:
            said = _input(session).strip()
        except (EOFError, KeyboardInterrupt):
            session.err.print()
            return None
        if said == "/exit":
            return None
        if said in ("/help", "/?"):
            session.err.print(Text(_HELP, style="dim"))
        elif said:
            return said


def _input(session: Session) -> str:
    # `input` alone knows the width of its prompt when a line is edited, but writes it to stdout.
    return input("> ") if session.out.is_terminal else session.err.input("> ")


def _tell(session: Session, error: RungError) -> None:
    failure = failure_of(error, address=session.connection.address)
    session.err.print(Text(f"error: {failure.message}", style="red"), soft_wrap=True)
    if failure.hint:
        session.err.print(Text(f"hint: {failure.hint}", style="dim"), soft_wrap=True)
    if is_unreachable(error):
        raise typer.Exit(ExitCode.UNREACHABLE)
