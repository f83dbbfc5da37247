"""What the control plane adds to the `rung` command: serve, up, config, demo, fit, simulate.

Everything heavy is imported inside the functions: `rung --help` imports this module.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from rung.cli import ExitCode, default_state_dir, load_checked, make_console, print_schema
from rung.cli.views import print_workflow

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

config = typer.Typer(
    help="Check and write configuration files, and print their JSON schema.", no_args_is_help=True
)


def serve(
    config_file: ConfigFile = None,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of the file's.")] = None,
    http_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of the file's.")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(envvar="RUNG_STATE_DIR", help="State, instead of the file's.")
    ] = None,
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
    settings = with_overrides(
        loaded, grpc_port=grpc_port, http_port=http_port, state_dir=state_dir, log_level=log_level
    )
    raise typer.Exit(run(settings, path))


def up(
    config_file: ConfigFile = None,
    agent_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The agent's configuration (what it may run).")
    ] = None,
    node_id: Annotated[str, typer.Option(help="Name of this box as a node; by default its host name.")] = "",
    state_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="RUNG_STATE_DIR", help="State, instead of the file's, and logs; ~/.local/state/rung."
        ),
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
        server_state_dir=state_dir,
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
    """Show everything in under a minute: no GPU needed, nothing downloaded, nothing left behind.

    Two machines are simulated, a workstation with an RTX 5090 and a DGX Spark; control plane, agents,
    gRPC, HTTP and the event log are the real ones.

    Example: `rung demo --serve`
    """
    from controlplane.demo import DemoOptions, run_demo

    raise typer.Exit(run_demo(DemoOptions(serve=serve_on, gguf=gguf), make_console()))


def fit(
    model: Annotated[
        str, typer.Argument(help="A known model, as in llama-3.1-8b, or any name with --parameters.")
    ],
    gpu: Annotated[
        str, typer.Option(help="Memory of the GPU, as in 32GB, or one of rtx-5090, rtx-4090, h100, h200.")
    ] = "rtx-5090",
    weights: Annotated[
        str, typer.Option(help="Format: bf16, fp8, nvfp4, awq, gptq, q4_k_m, q8_0, …")
    ] = "bf16",
    kv_dtype: Annotated[
        str, typer.Option(help="KV cache: auto (16 bits), fp8, q8_0, q4_0, int4, …")
    ] = "auto",
    context_tokens: Annotated[
        int, typer.Option("--context", min=0, help="Tokens of a sequence; 0: the model's own longest.")
    ] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences at once, each to its end.")] = 1,
    reserve: Annotated[str, typer.Option(help="Memory that is kept free.")] = "2GiB",
    parameters: Annotated[str, typer.Option(help="Of a model that is not known, as in 8B.")] = "",
    layers: Annotated[int, typer.Option(min=0, help="Its layers.")] = 0,
    key_value_heads: Annotated[int, typer.Option("--kv-heads", min=0, help="Its key-value heads.")] = 0,
    head_size: Annotated[int, typer.Option(min=0, help="The size of a head.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a model fits on a GPU, before anything is downloaded or started; exit code 1 if not.

    Example: `rung fit llama-3.1-8b --gpu 32GB --weights awq --context 32768 --kv-dtype fp8`
    """
    from controlplane.fit import FitQuestion, answer_fit, print_fit

    question = FitQuestion(
        model=model,
        gpu=gpu,
        weights=weights,
        kv_dtype=kv_dtype,
        context_tokens=context_tokens,
        sequences=sequences,
        reserve=reserve,
        parameters=parameters,
        layers=layers,
        key_value_heads=key_value_heads,
        head_size=head_size,
    )
    architecture, found = answer_fit(question)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode({"model": architecture.name, "fits": found.fits, "fit": found}))
    else:
        print_fit(make_console(), question, architecture, found)
    if not found.fits:
        raise typer.Exit(ExitCode.FAILED)


def simulate(
    trace: Annotated[
        str, typer.Argument(metavar="TRACE", help="A file, or one of those that --list shows.")
    ] = "",
    policies: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="NAME", help="Only this one; may be given several times."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random requests, instead of the trace's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    list_them: Annotated[
        bool, typer.Option("--list", help="Show the traces that come with Rung, and the policies.")
    ] = False,
    print_it: Annotated[
        bool, typer.Option("--print", help="Print the trace itself, to start one's own from.")
    ] = False,
) -> None:
    """Say how long requests would wait on a node, with Rung and with what people use today.

    Rung's own scheduler lives through a day of requests in a few seconds: no GPU, no control plane. The
    others live through the same requests on the same node, so that the lines of the table compare.

    A trace is the node, its deployments with their sizes and timings, and what is asked of them. Take one
    that comes with Rung, change sizes and rates to yours, and see what more memory, another model or other
    habits would do.

    Examples: `rung simulate family-of-five`, `rung simulate --list`,
    `rung simulate solo-developer --print > mine.yaml && rung simulate mine.yaml --policy rung --policy lru`
    """
    from controlplane.simulation import find_trace, print_traces, run_simulate

    out = make_console()
    if list_them:
        print_traces(out, as_json=as_json)
    elif not trace:
        typer.echo("error: which trace? `rung simulate --list` shows those that come with Rung", err=True)
        raise typer.Exit(ExitCode.USAGE)
    elif print_it:
        typer.echo(find_trace(trace).read_text(encoding="utf-8"), nl=False)
    else:
        run_simulate(
            trace,
            policies=policies or (),
            seed=seed,
            as_json=as_json,
            out=out,
            err=make_console(stderr=True),
        )


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
    loaded = load_checked(load_config, path)
    server = loaded.server
    counts = f"{_count(len(loaded.nodes), 'node')}, {_count(len(loaded.deployment_specs()), 'deployment')}"
    problems = loaded.images.workflows().problems
    if problems:
        # A server starts all the same, without these.
        for problem in problems:
            typer.echo(str(problem), err=True)
        raise typer.Exit(ExitCode.FAILED)
    typer.echo(f"{path}: OK: {counts}; gRPC {server.grpc_port}, HTTP {server.http_port}")


@config.command("schema")
def schema() -> None:
    """Print the JSON schema of the configuration, for editors.

    Example: `rung config schema > rung.schema.json`
    """
    from controlplane.config import config_schema

    print_schema(config_schema())


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


def check_workflow(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Graphs in ComfyUI's API format.")],
) -> None:
    """Say whether workflows of your own can be used, and if not, why.

    A `NAME.yaml` beside `NAME.json` is looked at, too. What nodes and models ComfyUI has is not: it says
    so itself when the workflow is run.

    Example: `rung workflow check workflows/*.json`
    """
    from controlplane.workflows import read_file, remarks

    out = make_console()
    failed = False
    for file in files:
        try:
            template = read_file(file)
        except ValueError as error:
            failed = True
            typer.echo(f"{file}: {error}", err=True)
            continue
        typer.echo(f"{file}: OK")
        for remark in remarks(template):
            typer.echo(f"  note: {remark}")
        print_workflow(out, template.listed())
    if failed:
        raise typer.Exit(ExitCode.FAILED)


def find_config() -> Path | None:
    """The configuration that is used when none is named."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    places = (Path("rung.yaml"), home / "rung" / "rung.yaml", Path("/etc/rung/rung.yaml"))
    return next((place for place in places if place.is_file()), None)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
