"""A trace: a node, what is deployed on it, and what is asked of it.

A trace is a YAML file, or JSON Lines: then the first line is a trace without its `requests`, and each
other line is one of those. Sizes are written `12GiB` or `6GB`, durations `2s` or `1h30m`. The traces that
Rung ships (`rung simulate --list`) are commented; `rung simulate NAME --print` shows one to start from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from controlplane.vram import Timings
from rung.errors import ConfigError, NotFoundError
from rung.service import ByteSize, DurationS, FieldError, load_json_lines_model, load_yaml_model
from rung.types import Priority, Residency, ResidencyClass

_ID = r"^[a-z0-9][a-z0-9._-]{0,62}$"
_GIB = 1 << 30
_SHIPPED = Path(__file__).parent / "traces"
_SUFFIXES = {".yaml", ".yml", ".json", ".jsonl", ".ndjson"}
_LINES = {".jsonl", ".ndjson"}

Positive = Annotated[DurationS, Field(gt=0)]
NotNegative = Annotated[DurationS, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)


class TraceNode(_Model):
    """The machine: one GPU.

    The scheduler hears of a measurement as late as it does of a real agent: `telemetry` is how often one
    is made, beside those after each operation, and each counts as `telemetry_lag` older than it is heard.
    """

    vram_bytes: ByteSize = Field(alias="vram", gt=0)
    reserve_bytes: ByteSize = Field(default=_GIB, alias="reserve", ge=0)
    unattributed_bytes: ByteSize = Field(default=0, alias="unattributed", ge=0)
    host_memory_bytes: ByteSize = Field(default=64 * _GIB, alias="host_memory", ge=0)
    telemetry_s: NotNegative = Field(default=1.0, alias="telemetry")
    telemetry_lag_s: NotNegative = Field(default=0.1, alias="telemetry_lag")


class TraceCheckpoint(_Model):
    """What an image engine loads by itself; `vram` while it generates, `kept` as its cache afterwards."""

    id: str = Field(pattern=_ID)
    vram_bytes: ByteSize = Field(alias="vram", gt=0)
    kept_bytes: ByteSize = Field(alias="kept", ge=0)
    load_s: NotNegative = Field(alias="load")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kept_bytes > self.vram_bytes:
            raise FieldError(("kept",), "is more than its vram")
        return self


class TraceDeployment(_Model):
    """A deployment: what it holds, what may be done to it, and how long that takes.

    An engine with `checkpoints` holds `vram` without any of them, and generates one image at a time.
    """

    id: str = Field(pattern=_ID)
    residency_class: ResidencyClass
    vram_bytes: ByteSize = Field(alias="vram", ge=0)
    residency: Residency | None = Field(default=None, description="At the beginning.")
    held_asleep_bytes: ByteSize = Field(default=0, alias="held_asleep", ge=0)
    host_asleep_bytes: ByteSize | None = Field(default=None, alias="host_asleep", ge=0)
    sleep_levels: tuple[Annotated[int, Field(ge=1, le=2)], ...] | None = None
    warm: bool = False
    idle_timeout_s: Positive | None = Field(default=None, alias="idle_timeout")
    slots: int = Field(default=16, ge=1, le=4096)
    sleep_s: NotNegative = Field(default=2.0, alias="sleep")
    wake_s: NotNegative = Field(default=7.5, alias="wake")
    discard_s: NotNegative = Field(default=1.0, alias="discard")
    reload_s: NotNegative = Field(default=15.0, alias="reload")
    stop_s: NotNegative = Field(default=5.0, alias="stop")
    start_s: NotNegative = Field(default=45.0, alias="start")
    free_s: NotNegative = Field(default=2.0, alias="free")
    checkpoints: tuple[TraceCheckpoint, ...] = ()

    @property
    def begins(self) -> Residency:
        """How it is at the beginning: up, unless it is only started on demand."""
        if self.residency is not None:
            return self.residency
        return Residency.STOPPED if self.residency_class is ResidencyClass.ON_DEMAND else Residency.AWAKE

    @property
    def timings(self) -> Timings:
        """How long its actions take."""
        return Timings(
            sleep_s=self.sleep_s,
            wake_s=self.wake_s,
            discard_s=self.discard_s,
            reload_s=self.reload_s,
            stop_s=self.stop_s,
            start_s=self.start_s,
            free_s=self.free_s,
            refill_s=max((each.load_s for each in self.checkpoints), default=0.0),
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        kind = self.residency_class
        if self.begins not in (Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED):
            raise FieldError(("residency",), "a trace begins awake, asleep or stopped")
        if self.begins is Residency.ASLEEP and kind is not ResidencyClass.SLEEPABLE:
            raise FieldError(("residency",), f"only what is sleepable can be asleep; this is {kind}")
        if kind is ResidencyClass.PINNED and self.begins is not Residency.AWAKE:
            raise FieldError(("residency",), "what is pinned is awake")
        if self.held_asleep_bytes > self.vram_bytes:
            raise FieldError(("held_asleep",), "is more than its vram")
        if self.checkpoints and kind is not ResidencyClass.CACHE:
            raise FieldError(("checkpoints",), f"only residency class cache has them; this is {kind}")
        if kind is ResidencyClass.CACHE and not self.checkpoints:
            raise FieldError(("residency_class",), "an engine of class cache needs checkpoints")
        _check_unique(self.checkpoints, "checkpoints")
        return self


class _Asks(_Model):
    """Whom a request is for."""

    kind: str = Field(pattern=_ID, description="Under which it is reported: chat, image-lightning, …")
    deployment: str
    checkpoint: str = ""
    priority: Priority = Priority.USER


class TraceRequest(_Asks):
    """One request: when it comes, and how long it takes once it runs."""

    at_s: NotNegative = Field(alias="at")
    service_s: Positive = Field(alias="service")


class TraceProcess(_Asks):
    """Requests drawn from the seed: bursts at random moments, a mean of `every` apart."""

    every_s: Positive = Field(alias="every", description="Mean time from one burst to the next.")
    burst: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 1)
    gap_s: tuple[NotNegative, NotNegative] = Field(
        default=(5.0, 15.0), alias="gap", description="Between those of a burst: the least and the most."
    )
    service_s: tuple[Positive, Positive] = Field(alias="service", description="The least and the most.")
    from_s: NotNegative = Field(default=0.0, alias="from")
    until_s: Positive | None = Field(default=None, alias="until")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.burst[0] > self.burst[1]:
            raise FieldError(("burst",), "the least is more than the most")
        if self.gap_s[0] > self.gap_s[1]:
            raise FieldError(("gap",), "the least is more than the most")
        if self.service_s[0] > self.service_s[1]:
            raise FieldError(("service",), "the least is more than the most")
        if self.until_s is not None and self.until_s <= self.from_s:
            raise FieldError(("until",), "is not after from")
        return self


class Trace(_Model):
    """A node, what is deployed on it, and what is asked of it."""

    title: str = Field(min_length=1)
    description: str = ""
    duration_s: Positive = Field(alias="duration", description="No process asks for anything later.")
    seed: int = 1
    node: TraceNode
    deployments: tuple[TraceDeployment, ...] = Field(min_length=1)
    requests: tuple[TraceRequest, ...] = ()
    processes: tuple[TraceProcess, ...] = ()

    def deployment(self, deployment_id: str) -> TraceDeployment:
        """A deployment by its id. Raises KeyError."""
        for each in self.deployments:
            if each.id == deployment_id:
                return each
        raise KeyError(deployment_id)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_unique(self.deployments, "deployments")
        if not (self.requests or self.processes):
            raise FieldError(("processes",), "nothing is ever asked for; write processes or requests")
        used_bytes = self.node.reserve_bytes + self.node.unattributed_bytes
        for number, each in enumerate(self.deployments):
            if each.begins is Residency.AWAKE:
                used_bytes += each.vram_bytes
            elif each.begins is Residency.ASLEEP:
                used_bytes += each.held_asleep_bytes
            if used_bytes > self.node.vram_bytes:
                over = (used_bytes - self.node.vram_bytes) / _GIB
                raise FieldError(
                    ("deployments", number, "vram"),
                    f"what is up at the beginning, with the reserve, is {over:.1f} GiB more than there is",
                )
        known = {each.id: each for each in self.deployments}
        for where, asks in self._asking():
            _check_asks(where, asks, known)
        return self

    def _asking(self) -> Iterator[tuple[tuple[str, int], _Asks]]:
        asking: tuple[tuple[str, Sequence[_Asks]], ...] = (
            ("requests", self.requests),
            ("processes", self.processes),
        )
        return itertools.chain.from_iterable(
            (((name, number), each) for number, each in enumerate(found)) for name, found in asking
        )


def _check_asks(where: tuple[str, int], asks: _Asks, known: dict[str, TraceDeployment]) -> None:
    found = known.get(asks.deployment)
    if found is None:
        names = ", ".join(known)
        raise FieldError((*where, "deployment"), f"there is no {asks.deployment!r}; there are {names}")
    checkpoints = [each.id for each in found.checkpoints]
    if checkpoints and asks.checkpoint not in checkpoints:
        there = f"{asks.deployment} has {', '.join(checkpoints)}"
        what = f"there is no {asks.checkpoint!r}; {there}" if asks.checkpoint else f"is missing; {there}"
        raise FieldError((*where, "checkpoint"), what)
    if asks.checkpoint and not checkpoints:
        raise FieldError((*where, "checkpoint"), f"{asks.deployment} has none")


def _check_unique(found: Sequence[TraceDeployment | TraceCheckpoint], field: str) -> None:
    seen: set[str] = set()
    for number, each in enumerate(found):
        if each.id in seen:
            raise FieldError((field, number, "id"), f"{each.id!r} is here twice")
        seen.add(each.id)


def shipped_traces() -> dict[str, Path]:
    """The traces that come with Rung, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def find_trace(name: str) -> Path:
    """The file of a trace: a path, or the name of one that comes with Rung.

    Raises:
        NotFoundError: it is neither.
    """
    shipped = shipped_traces().get(name)
    if shipped is not None:
        return shipped
    path = Path(name)
    if path.is_file():
        return path
    raise NotFoundError(f"there is no trace {name!r}; give a file, or one of {', '.join(shipped_traces())}")


def load_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        ConfigError: it cannot be used; one line for each thing that is wrong, with file, line and field.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: a trace is YAML (.yaml) or JSON Lines (.jsonl)")
    if path.suffix in _LINES:
        return load_json_lines_model(path, Trace, rows="requests")
    return load_yaml_model(path, Trace)
