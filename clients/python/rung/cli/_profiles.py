"""`rung profile`: which division of the VRAM holds, and another one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, TypeAlias

import typer

from rung._failure import error_of_failure
from rung.cli._deployments import Ndjson
from rung.cli._models import Json
from rung.cli._session import Session, session_of
from rung.cli.views import print_profile, print_switch_plan, profiles_view, show_switch
from rung.errors import UnknownProfileError
from rung.types import ProfileEvent, ProfileFailed, ProfilePlan

ProfileName: TypeAlias = Annotated[str, typer.Argument(metavar="PROFILE", help="Name of the profile.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    profile = typer.Typer(help="Named divisions of the VRAM.", no_args_is_help=True)
    profile.command("list")(list_profiles)
    profile.command()(show)
    profile.command()(switch)
    app.add_typer(profile, name="profile", rich_help_panel="VRAM")


def list_profiles(context: typer.Context, as_json: Json = False) -> None:
    """List the profiles, and which of them was applied and verified.

    Example: rung profile list --json | jq -r .current
    """
    session = session_of(context)
    found = session.run(lambda client: client.list_profiles())
    if as_json:
        session.print_json(found)
    else:
        session.out.print(profiles_view(found))


def show(context: typer.Context, profile: ProfileName, as_json: Json = False) -> None:
    """Show what a profile wants of each deployment.

    Example: rung profile show gaming
    """
    session = session_of(context)
    listed = session.run(lambda client: client.list_profiles())
    found = next((each for each in listed.profiles if each.name == profile), None)
    if found is None:
        raise UnknownProfileError(f"there is no profile {profile!r}", profile=profile)
    if as_json:
        session.print_json(found)
    else:
        print_profile(session.out, found, current=found.name == listed.current)


def switch(
    context: typer.Context,
    profile: ProfileName,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, step by step.")
    ] = False,
    as_json: Ndjson = False,
) -> None:
    """Apply a profile: memory is freed before it is taken, each step is measured, pinned ones stay.

    If a step fails, it goes back to what was before, and says what is back. Ctrl-C stops following, not
    switching.

    Example: rung profile switch gaming --dry-run
    """
    session = session_of(context)
    session.run(
        lambda client: _follow(
            session, client.switch_profile(profile, dry_run=dry_run), profile, dry_run, as_json=as_json
        )
    )


async def _follow(
    session: Session,
    events: AsyncGenerator[ProfileEvent, None],
    profile: str,
    dry_run: bool,
    *,
    as_json: bool,
) -> None:
    async with aclosing(events):
        if not (as_json or dry_run):
            await show_switch(events, console=session.out, profile=profile)
            return
        async for event in events:
            if as_json:
                session.print_json_line(event)
            elif isinstance(event.payload, ProfilePlan):
                print_switch_plan(session.out, event.payload, profile=profile)
            if isinstance(event.payload, ProfileFailed):
                raise error_of_failure(event.payload)
