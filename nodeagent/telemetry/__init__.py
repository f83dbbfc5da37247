"""What the agent measures of its machine: GPUs through NVML, host memory, disk, processors."""

from nodeagent.telemetry._source import GpuSample, GpuSource
from nodeagent.telemetry._telemetry import Telemetry

__all__ = ["GpuSample", "GpuSource", "Telemetry"]
