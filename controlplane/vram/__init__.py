"""VRAM: what every pool holds, what giving way costs, and the least harmful way to make room.

Pure: values in, values out. Whoever carries a plan out measures what it freed.
"""

from controlplane.vram._catalogue import ARCHITECTURES, find_architecture
from controlplane.vram._fit import Fit, check_fit
from controlplane.vram._footprint import (
    KV_FORMATS,
    OVERHEAD_BYTES,
    WEIGHT_FORMATS,
    Architecture,
    Footprint,
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
from controlplane.vram._ledger import (
    HELD_ASLEEP_ESTIMATE_BYTES,
    Facts,
    Ledger,
    LedgerEntry,
    Reservation,
    Timings,
    build_entry,
    build_ledger,
)
from controlplane.vram._options import GRADES, ReclaimAction, ReclaimGrade
from controlplane.vram._plan import Demand, Infeasible, ReclaimPlan, ReclaimStep, apply, plan

__all__ = [
    "ARCHITECTURES",
    "GRADES",
    "HELD_ASLEEP_ESTIMATE_BYTES",
    "KV_FORMATS",
    "OVERHEAD_BYTES",
    "WEIGHT_FORMATS",
    "Architecture",
    "Demand",
    "Facts",
    "Fit",
    "Footprint",
    "Infeasible",
    "KvFormat",
    "Ledger",
    "LedgerEntry",
    "ProfileShare",
    "ReclaimAction",
    "ReclaimGrade",
    "ReclaimPlan",
    "ReclaimStep",
    "Reservation",
    "Timings",
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
