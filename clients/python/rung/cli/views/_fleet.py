"""Nodes, GPUs, deployments and models on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rung.cli.views._memory import vram_bar, vram_legend, vram_shares
from rung.cli.views._words import format_age, format_bytes, format_part
from rung.types import (
    Deployment,
    DeploymentSpec,
    ExternalRuntime,
    FleetSnapshot,
    Gpu,
    GpuHealth,
    LlamaCppEngine,
    Model,
    Node,
    NodeState,
    Residency,
    ResidencyClass,
)

_NODE_STYLES = {
    NodeState.READY: "green",
    NodeState.CONNECTING: "yellow",
    NodeState.DRAINING: "yellow",
    NodeState.DRAINED: "yellow",
    NodeState.UNREACHABLE: "red",
}
_RESIDENCY_STYLES = {
    Residency.AWAKE: "green",
    Residency.ASLEEP: "blue",
    Residency.FAILED: "red",
    Residency.STOPPED: "dim",
    Residency.UNKNOWN: "dim",
}
_BAR_WIDTH = 32
_NARROW_BAR_WIDTH = 16
_NARROW_CONSOLE = 90


def plain_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table without lines; the columns in `right` hold figures. The first, of ids, is never folded."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=column == columns[0],
        )
    return table


def residency_text(deployment: Deployment) -> Text:
    """`awake`, `shrunk`, `starting 40 %`, `failed: out of memory`."""
    residency = deployment.residency
    # Its weights are where they were: it is not asleep as others are.
    shrunk = deployment.shrunk and residency is Residency.ASLEEP
    words = "shrunk" if shrunk else residency.value.replace("_", " ")
    text = Text(words, style=_RESIDENCY_STYLES.get(residency, "yellow"))
    if deployment.load_percent is not None and residency in (Residency.STARTING, Residency.WAKING):
        text.append(f" {deployment.load_percent:.0f} %")
    if residency is Residency.FAILED and deployment.detail:
        text.append(f": {deployment.detail}")
    elif deployment.adopted:
        text.append(" (adopted)", style="dim")
    return text


def engine_name(deployment: Deployment) -> str:
    """Which program serves it, and how it is run: `llama-server, process`."""
    spec = deployment.spec.engine
    engine = spec.engine.__struct_config__.tag
    if isinstance(spec.engine, LlamaCppEngine):
        engine = spec.engine.server.value
    return f"{str(engine).replace('_', ' ')}, {spec.runtime.__struct_config__.tag}"


def deployments_table(deployments: Sequence[Deployment]) -> RenderableType:
    """All deployments, or a sentence when there are none."""
    if not deployments:
        return Text(
            "No deployments yet. Start an engine (vLLM, llama.cpp, Ollama, ComfyUI): `rung up` finds it "
            "within seconds. Or describe some in rung.yaml: `rung config init` writes one.",
            "dim",
        )
    table = plain_table(
        "DEPLOYMENT", "MODEL", "NODE", "ENGINE", "RESIDENCY", "CLASS", "VRAM", "BUSY", right=("VRAM", "BUSY")
    )
    for deployment in deployments:
        spec = deployment.spec
        busy = f"{deployment.active_requests}/{spec.slots}"
        if deployment.queued_requests:
            busy += f" +{deployment.queued_requests}"
        table.add_row(
            Text(spec.id, style="bold"),
            Text(spec.model),
            Text(spec.node_id),
            Text(engine_name(deployment)),
            residency_text(deployment),
            Text(_class_words(spec)),
            format_bytes(deployment.vram_bytes),
            busy,
        )
    return table


def _class_words(spec: DeploymentSpec) -> str:
    """What may be done to a deployment. One that somebody else runs is never put to sleep, nor stopped."""
    acted_on = (ResidencyClass.SLEEPABLE, ResidencyClass.ON_DEMAND)
    if isinstance(spec.engine.runtime, ExternalRuntime) and spec.residency_class in acted_on:
        return "external"
    return spec.residency_class.value.replace("_", " ")


def models_table(models: Sequence[Model]) -> RenderableType:
    """What can be asked for by name."""
    if not models:
        return Text("No models: there are no deployments yet.", style="dim")
    table = plain_table("MODEL", "READY", "SERVED BY", "CONTEXT", "CAN", right=("CONTEXT",))
    for model in models:
        table.add_row(
            Text(model.id, style="bold"),
            Text("yes", style="green") if model.ready else Text("on demand", style="yellow"),
            Text(", ".join(model.deployments)),
            f"{model.context_tokens:,}" if model.context_tokens else "-",
            Text(", ".join(model.capabilities)),
        )
    return table


def node_view(
    node: Node,
    deployments: Sequence[Deployment],
    *,
    now_s: float,
    bar_width: int = _BAR_WIDTH,
    ascii_only: bool = False,
) -> RenderableType:
    """One node: its state, each GPU with a bar, and the machine around them."""
    lines: list[RenderableType] = [_node_line(node, now_s)]
    if node.detail:
        lines.append(Text(f"  {node.detail}", style="yellow"))
    status = node.status
    if status is None:
        return Group(*lines)
    for gpu in status.gpus:
        shares = vram_shares(gpu, deployments, gpu_count=len(status.gpus))
        lines.append(_gpu_line(gpu))
        bar = vram_bar(gpu, shares, width=bar_width, ascii_only=ascii_only)
        bar.append_text(_gauges(gpu))
        lines.append(Padding(bar, (0, 0, 0, 4), expand=False))
        if shares:
            lines.append(Padding(vram_legend(shares, ascii_only=ascii_only), (0, 0, 0, 4), expand=False))
    if not status.gpus:
        lines.append(Text("  no GPU", style="dim"))
    host = status.host
    used = host.memory_total_bytes - host.memory_available_bytes
    lines.append(
        Text(
            f"  host: RAM {format_part(used, host.memory_total_bytes)}, "
            f"{host.cpu_count} CPUs at {host.cpu_utilization_percent:.0f} %, "
            f"{format_bytes(host.disk_free_bytes)} disk free",
            style="dim",
        )
    )
    lines += [Text(f"  ! {warning}", style="yellow") for warning in status.warnings]
    return Group(*lines)


def fleet_view(
    snapshot: FleetSnapshot, *, now_s: float, width: int = 120, ascii_only: bool = False
) -> RenderableType:
    """Everything in a snapshot. Says first what in it is simulated."""
    parts: list[RenderableType] = []
    simulated = [node.id for node in snapshot.nodes if node.status is not None and node.status.simulated]
    if simulated:
        are = "is" if len(simulated) == 1 else "are"
        parts += [Text(f"Simulated: the GPUs of {', '.join(simulated)} {are} not real.", "yellow"), Text()]
    for alert in snapshot.alerts:
        free, limit = format_bytes(alert.free_bytes), format_bytes(alert.limit_bytes)
        parts.append(Text(f"! {alert.gpu} is low on memory: {free} free, less than {limit}", "red"))
    if not snapshot.nodes:
        parts.append(Text("No nodes. `rung up` runs one on this box; others are listed in rung.yaml.", "dim"))
    bar_width = _NARROW_BAR_WIDTH if width < _NARROW_CONSOLE else _BAR_WIDTH
    for node in snapshot.nodes:
        own = [each for each in snapshot.deployments if each.spec.node_id == node.id]
        parts += [
            node_view(node, own, now_s=now_s, bar_width=bar_width, ascii_only=ascii_only),
            Text(),
        ]
    if snapshot.profile:
        parts += [Text.assemble("profile ", (snapshot.profile, "bold")), Text()]
    parts.append(deployments_table(snapshot.deployments))
    return Group(*parts)


def _node_line(node: Node, now_s: float) -> Text:
    line = Text()
    line.append(node.id, style="bold")
    line.append(f"  {node.state.value}", style=_NODE_STYLES[node.state])
    status = node.status
    if status is not None and status.simulated:
        line.append("  simulated", style="yellow")
    line.append(f"  {node.address}", style="dim")
    if node.state is not NodeState.READY and node.last_seen_time_s is not None:
        line.append(f"  last seen {format_age(node.last_seen_time_s, now_s)}", style="dim")
    if status is not None and status.driver_version:
        line.append(f"  driver {status.driver_version}", style="dim")
    return line


def _gpu_line(gpu: Gpu) -> Text:
    line = Text(f"  GPU {gpu.index}  {gpu.name}")
    if gpu.unified_memory:
        line.append("  memory shared with the host", style="dim")
    if gpu.health not in (GpuHealth.OK, GpuHealth.UNKNOWN):
        line.append(f"  {gpu.health.value}", style="red")
    return line


def _gauges(gpu: Gpu) -> Text:
    gauges = Text(style="dim")
    if gpu.utilization_percent is not None:
        gauges.append(f"  {gpu.utilization_percent:.0f} % busy")
    if gpu.temperature_celsius is not None:
        gauges.append(f"  {gpu.temperature_celsius:.0f} °C")
    if gpu.power_watts is not None:
        gauges.append(f"  {gpu.power_watts:.0f} W")
    if gpu.throttle_reasons:
        gauges.append(f"  throttled: {', '.join(gpu.throttle_reasons)}", style="yellow")
    return gauges
