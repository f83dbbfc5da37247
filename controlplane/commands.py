"""What the control plane adds to the `rung` command: serve, up, config, demo.

Everything heavy is imported inside the functions: `rung --help` imports this module.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from rung.cli import ExitCode, default_state_dir, make_console
from rung.errors import ConfigError

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
ConfigFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="RUNG_CONFIG",
        metavar="FILE",
        help="Configuration; by default ./rung.yaml, ~/.config/rung/rung.yaml or /etc/rung/rung.yaml.",
    ),
]

config = typer.Typer(help="Check, explain and write configuration files.", no_args_is_help=True)


def serve(
    config_file: ConfigFile = None,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of the file's.")] = None,
    http_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of the file's.")] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="Instead of the file's.")] = None,
) -> None:
    """Run the control plane: gRPC on 8151, HTTP on 8150, both on loopback.

    SIGTERM and Ctrl-C drain it: no new work is taken, what runs may finish, engines go on.

    Example: `rung serve --config rung.yaml`
    """
    from controlplane.app import run
    from controlplane.config import default_config, load_config
    from controlplane.local import with_overrides

    path = config_file or find_config()
    loaded = default_config() if path is None else load_config(path)
    raise typer.Exit(
        run(with_overrides(loaded, grpc_port=grpc_port, http_port=http_port, log_level=log_level))
    )


def up(
    config_file: ConfigFile = None,
    agent_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The agent's configuration (what it may run).")
    ] = None,
    node_id: Annotated[str, typer.Option(help="Name of this box as a node; by default its host name.")] = "",
    state_dir: Annotated[
        Path | None, typer.Option(envvar="RUNG_STATE_DIR", help="State and logs; ~/.local/state/rung.")
    ] = None,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of 8151.")] = None,
    http_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of 8150.")] = None,
    agent_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of the agent; a configuration has its own.")
    ] = 8152,
    simulated_gpus: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Use a simulated machine instead of this one's GPUs.")
    ] = None,
) -> None:
    """Run the control plane and an agent on this box, until Ctrl-C.

    With no configuration the GPUs, and engines that already run here (vLLM, llama.cpp, Ollama, ComfyUI
    on their usual ports), are found and used as they are.

    Example: `rung up`, then in another terminal `rung chat 'Hello'`
    """
    from controlplane.local import UpOptions, run_up

    options = UpOptions(
        state_dir=state_dir or default_state_dir(),
        config=config_file or find_config(),
        agent_config=agent_config,
        node_id=node_id,
        grpc_port=grpc_port,
        http_port=http_port,
        agent_port=agent_port,
        simulated_gpus=simulated_gpus,
    )
    raise typer.Exit(run_up(options, make_console()))


def demo(
    serve_on: Annotated[
        bool, typer.Option("--serve", help="Keep it running afterwards, to play with, until Ctrl-C.")
    ] = False,
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            resolve_path=True,
            help="Answer from this model with a real llama.cpp instead of a simulated one.",
        ),
    ] = None,
) -> None:
    """Show everything in half a minute: no GPU needed, nothing downloaded, nothing left behind.

    Two machines are simulated, a workstation with an RTX 5090 and a DGX Spark; control plane, agents,
    gRPC, HTTP and the event log are the real ones.

    Example: `rung demo --serve`
    """
    from controlplane.demo import DemoOptions, run_demo

    raise typer.Exit(run_demo(DemoOptions(serve=serve_on, gguf=gguf), make_console()))


@config.command("check")
def check(
    file: Annotated[Path | None, typer.Argument(help="By default the one that `rung serve` takes.")] = None,
) -> None:
    """Say whether a configuration can be used, and if not, where and why.

    Example: `rung config check rung.yaml`
    """
    from controlplane.config import load_config

    path = file or find_config()
    if path is None:
        typer.echo("error: there is no rung.yaml; `rung config init` writes one to start with", err=True)
        raise typer.Exit(ExitCode.FAILED)
    try:
        loaded = load_config(path)
    except ConfigError as error:
        # As compilers do it, so that editors find the place.
        typer.echo(error.message, err=True)
        raise typer.Exit(ExitCode.FAILED) from None
    server = loaded.server
    counts = f"{_count(len(loaded.nodes), 'node')}, {_count(len(loaded.deployment_specs()), 'deployment')}"
    typer.echo(f"{path}: OK: {counts}; gRPC {server.grpc_port}, HTTP {server.http_port}")


@config.command("schema")
def schema() -> None:
    """Print the JSON schema of the configuration, for editors.

    Example: `rung config schema > rung.schema.json`
    """
    import json

    from controlplane.config import config_schema

    typer.echo(json.dumps(config_schema(), indent=2))


@config.command("init")
def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("rung.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a configuration to start with; its comments say what to change.

    Example: `rung config init && rung config check`
    """
    from controlplane.local import STARTER_CONFIG

    try:
        with file.open("w" if force else "x") as target:
            target.write(STARTER_CONFIG)
    except FileExistsError:
        typer.echo(f"error: {file} is there already; --force replaces it", err=True)
        raise typer.Exit(ExitCode.FAILED) from None
    typer.echo(f"wrote {file}; next: edit it, `rung config check {file}`, `rung serve --config {file}`")


def find_config() -> Path | None:
    """The configuration that is used when none is named."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    places = (Path("rung.yaml"), home / "rung" / "rung.yaml", Path("/etc/rung/rung.yaml"))
    return next((place for place in places if place.is_file()), None)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
