"""What the agent adds to the `rung` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rung.cli import load_checked, print_schema

agent = typer.Typer(
    help="Run the agent of this machine, check its configuration, and print its JSON schema.",
    no_args_is_help=True,
)


@agent.command("run")
def run_agent(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration of the agent.")
    ] = None,
    node_id: Annotated[
        str | None, typer.Option(help="Name of this machine; by default its host name.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="gRPC port; 0 picks a free one.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where records and logs are kept.")] = None,
    discover: Annotated[
        bool | None,
        typer.Option(
            "--discover/--no-discover", help="Adopt engines that run here already, on their usual ports."
        ),
    ] = None,
    simulated_gpus: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Use a simulated machine instead of the GPUs.")
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="Instead of the file's.")
    ] = None,
) -> None:
    """Run the agent: gRPC on 8152, on loopback. Engines go on when it stops, and are taken back later.

    Example: `rung agent run --discover`
    """
    from pydantic import ValidationError

    from nodeagent.app import run
    from nodeagent.config import AgentConfig, load_agent_config
    from rung.errors import ConfigError

    given: dict[str, Any] = {
        "node_id": node_id,
        "port": port,
        "state_dir": state_dir,
        "discover": discover,
        "simulated_gpus": simulated_gpus,
    }
    try:
        loaded = load_agent_config(config) if config is not None else AgentConfig()
        if log_level is not None:
            given["log"] = loaded.log.model_dump(exclude_unset=True) | {"level": log_level}
        overridden = {name: value for name, value in given.items() if value is not None}
        settings = AgentConfig.model_validate(loaded.model_dump(exclude_unset=True) | overridden)
    except ConfigError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(1) from None
    except ValidationError as error:
        for found in error.errors():
            typer.echo(f"error: {'.'.join(str(part) for part in found['loc'])}: {found['msg']}", err=True)
        raise typer.Exit(1) from None
    raise typer.Exit(run(settings))


@agent.command("check")
def check(file: Annotated[Path, typer.Argument(help="What `rung agent run --config` is to take.")]) -> None:
    """Say whether an agent's configuration can be used, and if not, where and why.

    Example: `rung agent check agent.yaml`
    """
    from nodeagent.config import load_agent_config

    loaded = load_checked(load_agent_config, file)
    allowed = loaded.allow_list()
    programs = ", ".join(sorted(allowed.executables)) or "no program"
    images = f", images: {', '.join(allowed.images)}" if allowed.images else ""
    typer.echo(f"{file}: OK: node {loaded.node_id}, gRPC {loaded.port}; may run {programs}{images}")


@agent.command("schema")
def schema() -> None:
    """Print the JSON schema of an agent's configuration, for editors.

    Example: `rung agent schema > agent.schema.json`
    """
    from nodeagent.config import agent_schema

    print_schema(agent_schema())
