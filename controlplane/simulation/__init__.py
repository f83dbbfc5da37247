"""The scheduler without a node: simulated pools in virtual time, and `rung simulate`."""

from controlplane.simulation._command import print_traces, run_simulate
from controlplane.simulation._pool import BrokenInvariantError, VirtualEngine, VirtualPool
from controlplane.simulation._report import PolicyReport, SimulationReport, Waits
from controlplane.simulation._requests import Request, draw_requests
from controlplane.simulation._simulate import POLICIES, simulate
from controlplane.simulation._trace import Trace, find_trace, load_trace, shipped_traces
from controlplane.simulation._virtual_time import VirtualTimeLoop, run_in_virtual_time

__all__ = [
    "POLICIES",
    "BrokenInvariantError",
    "PolicyReport",
    "Request",
    "SimulationReport",
    "Trace",
    "VirtualEngine",
    "VirtualPool",
    "VirtualTimeLoop",
    "Waits",
    "draw_requests",
    "find_trace",
    "load_trace",
    "print_traces",
    "run_in_virtual_time",
    "run_simulate",
    "shipped_traces",
    "simulate",
]
