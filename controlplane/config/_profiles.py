"""Profiles in the configuration, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Protocol

from pydantic import Field

from controlplane.config._swap_slots import check_awake_together
from controlplane.vram import HELD_ASLEEP_ESTIMATE_BYTES, ProfileShare, check_profile
from rung import types
from rung.errors import ConfigError
from rung.service import ConfigModel, FieldError

_ID = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class ProfileResidency(StrEnum):
    """What a profile may want of a deployment."""

    AWAKE = "awake"
    ASLEEP = "asleep"
    STOPPED = "stopped"


class Others(StrEnum):
    """What becomes of the deployments that a profile does not name."""

    AS_THEY_ARE = "as_they_are"
    STOPPED = "stopped"


class ProfileEntryConfig(ConfigModel):
    """What a profile wants of one deployment."""

    deployment: str
    """Id of the deployment."""
    residency: ProfileResidency
    """Where it is to be while the profile is current."""
    gpu_memory_utilization: float = Field(default=0.0, ge=0, le=1)
    """Share of the GPU that vLLM reserves; 0 leaves its own."""


class ProfileConfig(ConfigModel):
    """A named division of the VRAM."""

    name: str = Field(pattern=_ID)
    """What `rung profile switch` calls it."""
    description: str = ""
    """One sentence for people."""
    deployments: tuple[ProfileEntryConfig, ...] = Field(min_length=1)
    """What it wants of whom."""
    others: Others = Others.AS_THEY_ARE
    """What becomes of those that are not named, on the nodes of those that are. Pinned ones, and what
    somebody else runs, always stay as they are."""
    hold: bool = False
    """While it is current, what it wants asleep or stopped is not woken by requests."""

    def profile(self, specs: Mapping[str, types.DeploymentSpec]) -> types.Profile:
        """As the rest of the system has it: whatever it changes is named."""
        entries = [
            types.ProfileEntry(
                each.deployment, types.Residency(each.residency.value), each.gpu_memory_utilization
            )
            for each in self.deployments
        ]
        if self.others is Others.STOPPED:
            named = {each.deployment for each in self.deployments}
            nodes = {specs[name].node_id for name in named}
            entries += [
                types.ProfileEntry(spec.id, types.Residency.STOPPED)
                for spec in specs.values()
                if spec.id not in named and spec.node_id in nodes and not (_pinned(spec) or _external(spec))
            ]
        return types.Profile(
            name=self.name, description=self.description, entries=tuple(entries), hold=self.hold
        )


class SizedNode(Protocol):
    """A node as configured."""

    @property
    def id(self) -> str:
        """Name."""
        ...

    @property
    def vram_bytes(self) -> int:
        """Memory of each of its GPUs; 0 if nobody said."""
        ...

    @property
    def vram_reserve_bytes(self) -> int:
        """What is kept free of each."""
        ...


def check_profiles(
    profiles: Sequence[ProfileConfig],
    specs: Mapping[str, types.DeploymentSpec],
    nodes: Sequence[SizedNode],
) -> None:
    """Refuse profiles that make no sense, or that cannot fit.

    Raises:
        FieldError: what is wrong, and where.
    """
    sized = {node.id: node for node in nodes}
    names: set[str] = set()
    for place, profile in enumerate(profiles):
        if profile.name in names:
            raise FieldError(("profiles", place, "name"), f"{profile.name} is used twice")
        names.add(profile.name)
        named: set[str] = set()
        for position, entry in enumerate(profile.deployments):
            below = ("profiles", place, "deployments", position)
            if entry.deployment in named:
                raise FieldError((*below, "deployment"), f"{entry.deployment} is here twice")
            named.add(entry.deployment)
            spec = specs.get(entry.deployment)
            if spec is None:
                known = ", ".join(sorted(specs)) or "none"
                raise FieldError(
                    (*below, "deployment"),
                    f"there is no deployment {entry.deployment}; deployments are: {known}",
                )
            fault = _fault(entry, spec)
            if fault is not None:
                raise FieldError((*below, fault[0]), fault[1])
        awake = [each.deployment for each in profile.deployments if each.residency is ProfileResidency.AWAKE]
        check_awake_together(specs, awake, ("profiles", place, "deployments"))
        try:
            _check_sums(profile.profile(specs), specs, sized)
        except ConfigError as error:
            raise FieldError(("profiles", place, "deployments"), error.message) from None


def _fault(entry: ProfileEntryConfig, spec: types.DeploymentSpec) -> tuple[str, str] | None:
    """The field that is at fault, and why; None if none is."""
    engine = spec.engine.engine
    wanted = entry.residency
    share = entry.gpu_memory_utilization
    if wanted is not ProfileResidency.AWAKE and _pinned(spec):
        return "residency", f"{spec.id} is pinned: no profile puts it to sleep or stops it; write awake"
    if wanted is not ProfileResidency.AWAKE and _external(spec):
        return "residency", f"{spec.id} is run by somebody else and cannot be {wanted} by us; write awake"
    if wanted is ProfileResidency.ASLEEP and not (isinstance(engine, types.VllmEngine) and engine.sleep_mode):
        return "residency", f"{spec.id} cannot sleep: only vLLM with sleep_mode: true can; write stopped"
    if not share:
        return None
    if not isinstance(engine, types.VllmEngine):
        return "gpu_memory_utilization", f"{spec.id} is not run by vLLM, which alone has such a share"
    if _external(spec):
        return "gpu_memory_utilization", f"{spec.id} is run by somebody else, who decides on its share"
    if _pinned(spec) and share != engine.gpu_memory_utilization:
        return (
            "gpu_memory_utilization",
            f"another share than {spec.id}'s own would mean to start it anew, and it is pinned",
        )
    return None


def _check_sums(
    profile: types.Profile,
    specs: Mapping[str, types.DeploymentSpec],
    nodes: Mapping[str, SizedNode],
) -> None:
    """Refuse what does not fit a GPU, as far as the configuration tells. Raises ConfigError."""
    entries = {entry.deployment_id: entry for entry in profile.entries}
    by_gpu: dict[tuple[str, str], list[ProfileShare]] = {}
    for spec in specs.values():
        entry = entries.get(spec.id)
        if entry is None and not _pinned(spec):
            continue
        share = _share(spec, entry)
        by_gpu.setdefault((spec.node_id, next(iter(spec.engine.gpus), "")), []).append(share)
    for (node_id, _), shares in by_gpu.items():
        node = nodes[node_id]
        if node.vram_bytes:
            check_profile(
                profile.name, shares, total_bytes=node.vram_bytes, reserve_bytes=node.vram_reserve_bytes
            )
            continue
        # Without a size at least the shares of the whole have to add up.
        parts = [share for share in shares if share.gpu_memory_utilization]
        if sum(share.gpu_memory_utilization for share in parts) > 1.0 + 1e-9:
            told = " + ".join(f"{share.deployment_id} {share.gpu_memory_utilization:.0%}" for share in parts)
            total = sum(share.gpu_memory_utilization for share in parts)
            raise ConfigError(f"profile {profile.name} does not fit: {told} = {total:.0%} of a GPU")


def _share(spec: types.DeploymentSpec, entry: types.ProfileEntry | None) -> ProfileShare:
    """What a deployment holds of its GPU while the profile is current; a pinned one is not named always."""
    engine = spec.engine.engine
    if entry is not None and entry.residency is types.Residency.STOPPED:
        return ProfileShare(deployment_id=spec.id)
    if entry is not None and entry.residency is types.Residency.ASLEEP:
        return ProfileShare(deployment_id=spec.id, vram_bytes=HELD_ASLEEP_ESTIMATE_BYTES)
    own = engine.gpu_memory_utilization if isinstance(engine, types.VllmEngine) else 0.0
    wanted = entry.gpu_memory_utilization if entry is not None else 0.0
    return ProfileShare(
        deployment_id=spec.id, gpu_memory_utilization=wanted or own, vram_bytes=spec.vram_bytes
    )


def _pinned(spec: types.DeploymentSpec) -> bool:
    return spec.residency_class is types.ResidencyClass.PINNED


def _external(spec: types.DeploymentSpec) -> bool:
    return isinstance(spec.engine.runtime, types.ExternalRuntime)
