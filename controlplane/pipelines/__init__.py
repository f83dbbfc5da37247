"""What each kind of job does, step by step."""

from controlplane.pipelines._begun import Begun
from controlplane.pipelines._openai import RequestHead, read_head
from controlplane.pipelines._pictures import check_side, looked_into, picture_of
from controlplane.pipelines._pipelines import Cloud, Pipelines
from controlplane.pipelines._slots import MAX_QUEUED, Slots
from controlplane.pipelines._wish import GENERATION_KINDS, Wish

__all__ = [
    "GENERATION_KINDS",
    "MAX_QUEUED",
    "Begun",
    "Cloud",
    "Pipelines",
    "RequestHead",
    "Slots",
    "Wish",
    "check_side",
    "looked_into",
    "picture_of",
    "read_head",
]
