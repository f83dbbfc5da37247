"""Workflows: templates of graphs, the tiers that fill them in, and which tier a wish deserves.

Pure, but for reading templates from files.
"""

from controlplane.workflows._build import build
from controlplane.workflows._effort import image_effort
from controlplane.workflows._folder import Problem, read_file
from controlplane.workflows._read import remarks
from controlplane.workflows._template import Parameter, ParameterType, Template, Variant
from controlplane.workflows._tiers import DEFAULT_TIERS, Tier, find_tier, tier_of_effort
from controlplane.workflows._workflows import Workflows

__all__ = [
    "DEFAULT_TIERS",
    "Parameter",
    "ParameterType",
    "Problem",
    "Template",
    "Tier",
    "Variant",
    "Workflows",
    "build",
    "find_tier",
    "image_effort",
    "read_file",
    "remarks",
    "tier_of_effort",
]
