"""VRAM: what every pool holds, what giving way costs, and the least harmful way to make room.

Ledger, planner and footprint model are pure: values in, values out. `NodeScheduler` owns a node: it grants
leases of what was measured free, and has plans carried out.
"""

from controlplane.vram._catalogue import ARCHITECTURES, find_architecture
from controlplane.vram._events import Granted, Planned, Raised, SchedulerEvent, Step, StepState, Waiting
from controlplane.vram._fit import Fit, check_fit
from controlplane.vram._footprint import (
    KV_FORMATS,
    OVERHEAD_BYTES,
    WEIGHT_FORMATS,
    Architecture,
    KvFormat,
    ProfileShare,
    WeightFormat,
    check_profile,
    estimate_footprint,
    kv_bytes_per_token,
    kv_format,
    reserved_bytes,
    weight_format,
    weights_bytes,
)
from controlplane.vram._leases import Lease
from controlplane.vram._ledger import (
    HELD_ASLEEP_ESTIMATE_BYTES,
    Facts,
    Ledger,
    LedgerEntry,
    Reservation,
    Reserve,
    Timings,
    build_entry,
    build_ledger,
)
from controlplane.vram._options import GRADES
from controlplane.vram._plan import Demand, apply, plan
from controlplane.vram._ports import (
    Executor,
    Measured,
    Measurement,
    PlacedDeployment,
    Pools,
    SchedulerOptions,
    Swap,
    SwapJournal,
    VramAlert,
)
from controlplane.vram._queue import Planner, QueueRules
from controlplane.vram._scheduler import NodeScheduler
from rung.types import Footprint, Infeasible, ReclaimAction, ReclaimGrade, ReclaimPlan, ReclaimStep

__all__ = [
    "ARCHITECTURES",
    "GRADES",
    "HELD_ASLEEP_ESTIMATE_BYTES",
    "KV_FORMATS",
    "OVERHEAD_BYTES",
    "WEIGHT_FORMATS",
    "Architecture",
    "Demand",
    "Executor",
    "Facts",
    "Fit",
    "Footprint",
    "Granted",
    "Infeasible",
    "KvFormat",
    "Lease",
    "Ledger",
    "LedgerEntry",
    "Measured",
    "Measurement",
    "NodeScheduler",
    "PlacedDeployment",
    "Planned",
    "Planner",
    "Pools",
    "ProfileShare",
    "QueueRules",
    "Raised",
    "ReclaimAction",
    "ReclaimGrade",
    "ReclaimPlan",
    "ReclaimStep",
    "Reservation",
    "Reserve",
    "SchedulerEvent",
    "SchedulerOptions",
    "Step",
    "StepState",
    "Swap",
    "SwapJournal",
    "Timings",
    "VramAlert",
    "Waiting",
    "WeightFormat",
    "apply",
    "build_entry",
    "build_ledger",
    "check_fit",
    "check_profile",
    "estimate_footprint",
    "find_architecture",
    "kv_bytes_per_token",
    "kv_format",
    "plan",
    "reserved_bytes",
    "weight_format",
    "weights_bytes",
]
