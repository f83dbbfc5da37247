"""The fleet's memory pools as the ledger has them: one for each GPU, named `node/index`. Pure."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from controlplane.fleet._view import DeploymentView, FleetView
from controlplane.vram import Facts, Ledger, Reserve, Timings, build_ledger
from rung.errors import InvalidRequestError, NotFoundError, UnavailableError, UnknownNodeError
from rung.types import (
    ComfyUiEngine,
    Engine,
    ExternalRuntime,
    Gpu,
    LlamaCppEngine,
    Node,
    NodeState,
    OllamaEngine,
    Residency,
    ServiceEngine,
    TransitionTimes,
)

#: Engines that keep models as a cache, and what one without any holds: CUDA context and the like.
_CACHING = (ComfyUiEngine, OllamaEngine)
_HELD_FLUSHED_BYTES = 1 << 29
#: How long the requests in flight are taken to need, as long as nobody knows better.
_DRAIN_EXPECTED_S = 10.0
_DEFAULTS = Timings()
_HEARD = frozenset({NodeState.READY, NodeState.DRAINING, NodeState.DRAINED})


def find_gpu(view: FleetView, pool_id: str) -> tuple[Node, Gpu]:
    """The node and the GPU of a pool.

    Raises:
        InvalidRequestError: not of the form `node/index`.
        UnknownNodeError, NotFoundError: there is no such node, or it has no such GPU.
        UnavailableError: the node is not heard.
    """
    node_id, slash, index = pool_id.rpartition("/")
    if not slash or not index.isdecimal():
        raise InvalidRequestError(f"{pool_id!r} is not a GPU; write node/index, as in workstation/0")
    node = view.nodes.get(node_id)
    if node is None:
        raise UnknownNodeError(f"there is no node {node_id}", node=node_id)
    if node.status is None or node.state not in _HEARD:
        raise UnavailableError(f"{node_id} is {node.state}: its memory is not known now", node=node_id)
    for gpu in node.status.gpus:
        if gpu.index == int(index):
            return node, gpu
    there = ", ".join(f"{node_id}/{gpu.index}" for gpu in node.status.gpus) or "none"
    raise NotFoundError(f"{node_id} has no GPU {index}; there are: {there}", gpu=pool_id)


def pool_of(found: DeploymentView) -> str | None:
    """The pool that a deployment is, or would be, on; None if its node has no GPU or is not known.

    Of several GPUs that it names, the first: what it holds of the others is in their ledgers all the same.
    """
    status = found.node.status
    if status is None or not status.gpus:
        return None
    on = [gpu for gpu in status.gpus if _is_on(found, gpu, len(status.gpus))]
    return f"{found.node.id}/{(on or status.gpus)[0].index}"


def is_scheduled(found: DeploymentView) -> bool:
    """Whether a deployment becomes awake through its node's scheduler: it is ours, and on a GPU."""
    external = isinstance(found.deployment.spec.engine.runtime, ExternalRuntime)
    return not external and pool_of(found) is not None


def held_bytes(found: DeploymentView) -> int | None:
    """What a deployment was measured to hold of its pool; None where nobody can tell."""
    pool_id, status = pool_of(found), found.node.status
    if pool_id is None or status is None:
        return None
    gpu = next(gpu for gpu in status.gpus if pool_id == f"{found.node.id}/{gpu.index}")
    return _measured_bytes(found, gpu, len(status.gpus))


def ledger_of(
    view: FleetView,
    pool_id: str,
    *,
    load: Callable[[str], tuple[int, int]],
    idle_s: Callable[[str], float],
    reserve: Reserve,
) -> Ledger:
    """What a pool holds now, and whose it is. Raises as `find_gpu`.

    Args:
        view: the fleet.
        pool_id: `node/index`.
        load: active and queued requests of a deployment.
        idle_s: time since a deployment was last used.
        reserve: what is kept free on the node.
    """
    node, gpu = find_gpu(view, pool_id)
    assert node.status is not None
    gpu_count = len(node.status.gpus)
    on_pool = []
    for deployment_id, found in view.deployments.items():
        if found.node.id != node.id or not _is_on(found, gpu, gpu_count):
            continue
        active, _ = load(deployment_id)
        measured_bytes = _measured_bytes(found, gpu, gpu_count)
        on_pool.append(
            (
                replace(found.deployment, active_requests=active),
                Facts(
                    measured_bytes=measured_bytes,
                    asleep_level=found.deployment.asleep_level,
                    cache_bytes=_cache_bytes(found, measured_bytes),
                    drain_expected_s=_DRAIN_EXPECTED_S if active else 0.0,
                    idle_s=idle_s(deployment_id),
                    timings=_timings_of(found.deployment.usual_times),
                ),
            )
        )
    return build_ledger(
        pool_id=pool_id,
        total_bytes=gpu.memory_total_bytes,
        free_bytes=gpu.memory_free_bytes,
        deployments=on_pool,
        reserve_bytes=reserve.vram_bytes,
        unified=gpu.unified_memory,
        host_free_bytes=node.status.host.memory_available_bytes,
        host_reserve_bytes=reserve.host_bytes,
    )


def _timings_of(usual: TransitionTimes) -> Timings:
    """How long a deployment's actions take, as learnt.

    What has not been seen yet is to its start as the defaults are to theirs. As they stand, a model that
    starts within seconds would seem to wake more slowly than it starts: it would never be put to sleep, and
    so it would never be learnt.
    """
    scale = 1.0 if usual.start_s is None else usual.start_s / _DEFAULTS.start_s
    return replace(
        _DEFAULTS,
        **{
            name: getattr(_DEFAULTS, name) * scale if learnt_s is None else learnt_s
            for name, learnt_s in msgspec.structs.asdict(usual).items()
        },
    )


def _cache_bytes(found: DeploymentView, measured_bytes: int | None) -> int:
    """What a flush would give back of an engine that keeps models as a cache."""
    deployment = found.deployment
    if not _caches(deployment.spec.engine.engine) or deployment.residency is not Residency.AWAKE:
        return 0
    return max(0, (measured_bytes or 0) - _HELD_FLUSHED_BYTES)


def _caches(engine: Engine) -> bool:
    match engine:
        case LlamaCppEngine(router_model=router_model):
            return bool(router_model)
        case ServiceEngine(dialect=dialect):
            return dialect == "speaches"
        case _:
            return isinstance(engine, _CACHING)


def _is_on(found: DeploymentView, gpu: Gpu, gpu_count: int) -> bool:
    """Whether a deployment is, or would be, on a GPU; one that names none takes what there is."""
    named = found.deployment.spec.engine.gpus
    if named:
        return str(gpu.index) in named or gpu.uuid in named
    return gpu_count == 1 or any(process.deployment_id == found.agent_id for process in gpu.processes)


def _measured_bytes(found: DeploymentView, gpu: Gpu, gpu_count: int) -> int | None:
    """What the processes of a deployment hold of a GPU; None where the platform does not tell.

    Of the sample that has the GPU's free bytes, where it can be: what the agent says of the deployment may
    be newer, and then what it has just taken would seem to be free as well.
    """
    tells = any(process.memory_bytes is not None for process in gpu.processes)
    held = [process.memory_bytes for process in gpu.processes if process.deployment_id == found.agent_id]
    known = [size_bytes for size_bytes in held if size_bytes is not None]
    if tells and len(known) == len(held):
        return sum(known)
    return found.deployment.vram_bytes if gpu_count == 1 else None
