"""`rung demo`: a fleet on one computer, without a GPU, that tells what it does.

What is simulated is said first. The sweeper, a process of its own, ends whatever the demo started
and removes its folder, however the demo itself ends.
"""

from controlplane.demo._demo import run_demo
from controlplane.demo._layout import DemoOptions

__all__ = ["DemoOptions", "run_demo"]
