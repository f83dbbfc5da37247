"""The fleet as the planner of profiles sees it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from controlplane.fleet import DeploymentView, Fleet, ledger_of, pool_of, utilization_of
from controlplane.profiles._plan import Pool, Standing
from controlplane.vram import HELD_ASLEEP_ESTIMATE_BYTES, Ledger, Reserve, reserved_bytes
from rung.errors import NodeUnreachableError, UnknownDeploymentError
from rung.types import DeploymentSpec, ExternalRuntime, Residency, VllmEngine

_RESERVE = Reserve()


def look(
    fleet: Fleet, named: Collection[str], reserves: Mapping[str, Reserve]
) -> tuple[dict[str, Standing], dict[str, Pool]]:
    """How the configured deployments stand, those without requests first, and the GPUs of those named.

    Args:
        fleet: the fleet.
        named: deployments that have to be known.
        reserves: by node, what is never granted, where that is not as usual.

    Raises:
        UnknownDeploymentError: one that is named is not configured any more.
        NodeUnreachableError: the node of one that is named is not heard.
    """
    view = fleet.view
    standings: dict[str, Standing] = {}
    ledgers: dict[str, Ledger] = {}
    for spec in sorted(fleet.configured, key=lambda each: (sum(fleet.load(each.id)), each.id)):
        found = view.deployments.get(spec.id)
        if found is None or found.deployment.residency is Residency.UNKNOWN:
            continue
        pool_id = pool_of(found) or ""
        if pool_id and pool_id not in ledgers:
            reserve = reserves.get(spec.node_id, _RESERVE)
            ledgers[pool_id] = ledger_of(
                view, pool_id, load=fleet.load, idle_s=lambda _: 0.0, reserve=reserve
            )
        standings[spec.id] = _standing(spec, found, pool_id, ledgers.get(pool_id))
    for deployment_id in named:
        if deployment_id not in standings:
            raise _unknown(fleet, deployment_id)
    used = {standings[deployment_id].pool_id for deployment_id in named} - {""}
    pools = {
        pool_id: Pool(
            total_bytes=ledgers[pool_id].total_bytes,
            reserve_bytes=ledgers[pool_id].reserve_bytes,
            available_bytes=ledgers[pool_id].available_bytes,
        )
        for pool_id in sorted(used)
    }
    return standings, pools


def _unknown(fleet: Fleet, deployment_id: str) -> UnknownDeploymentError | NodeUnreachableError:
    found = fleet.view.deployments.get(deployment_id)
    if found is None:
        return UnknownDeploymentError(f"there is no deployment {deployment_id}", deployment=deployment_id)
    node = found.node
    return NodeUnreachableError(
        f"{deployment_id} is on {node.id}, which does not answer: {node.detail or node.state}", node=node.id
    )


def _standing(spec: DeploymentSpec, found: DeploymentView, pool_id: str, ledger: Ledger | None) -> Standing:
    deployment = found.deployment
    standing = Standing(
        deployment_id=spec.id,
        residency=deployment.residency,
        residency_class=spec.residency_class,
        configured_utilization=utilization_of(spec),
        running_utilization=(
            utilization_of(deployment.spec)
            if deployment.residency not in (Residency.STOPPED, Residency.FAILED)
            else 0.0
        ),
        can_sleep=isinstance(spec.engine.engine, VllmEngine) and spec.engine.engine.sleep_mode,
        external=isinstance(spec.engine.runtime, ExternalRuntime),
    )
    entry = ledger.entry(spec.id) if ledger is not None else None
    if ledger is None or entry is None:
        return standing
    awake_bytes = spec.vram_bytes or reserved_bytes(standing.configured_utilization, ledger.total_bytes)
    if ledger.unified:
        # One pool: a sleeper's weights stay where they are.
        asleep_bytes = awake_bytes
    elif deployment.residency is Residency.ASLEEP:
        asleep_bytes = entry.resident_bytes
    else:
        asleep_bytes = entry.held_asleep_bytes or min(HELD_ASLEEP_ESTIMATE_BYTES, awake_bytes)
    return replace(
        standing,
        pool_id=pool_id,
        resident_bytes=entry.resident_bytes,
        awake_bytes=awake_bytes,
        asleep_bytes=asleep_bytes,
        timings=entry.timings,
    )
