"""Profiles: named divisions of the VRAM, and switching from one to another."""

from controlplane.profiles._plan import Pool, Standing, plan_return, plan_switch
from controlplane.profiles._profiles import Profiles, ProfileStore

__all__ = ["Pool", "ProfileStore", "Profiles", "Standing", "plan_return", "plan_switch"]
