"""Models that take turns inside one Python process.

For scripts that have several models and memory for some of them: register a loader and a size for each,
and use them; whichever was used longest ago gives way. Nothing here needs a control plane. Where one is
near, the memory of each loaded model can be held under a lease of it, so that the rest of the machine
knows of it (`leases_of`).

    with ModelManager("22GiB") as models:
        models.register("vision", load_florence, "2.5GiB")
        models.register("speech", load_xtts, "2.5GiB")
        with models.use("vision") as florence:
            print(florence.describe(picture))
"""

from rung.local._leases import LeaseSource, leases_of
from rung.local._manager import ModelManager
from rung.local._memory import CudaMemory, Memory, cuda_memory
from rung.local._room import LocalModel, ModelState, bytes_missing, grouped, victims

__all__ = [
    "CudaMemory",
    "LeaseSource",
    "LocalModel",
    "Memory",
    "ModelManager",
    "ModelState",
    "bytes_missing",
    "cuda_memory",
    "grouped",
    "leases_of",
    "victims",
]
