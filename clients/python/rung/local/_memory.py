"""How much memory a device has left, as it says itself."""

from __future__ import annotations

import gc
import sys
from typing import Any, Protocol


class Memory(Protocol):
    """A device with memory that can be measured."""

    def free_bytes(self) -> int:
        """What could be taken now, by this process."""
        ...

    def give_back(self) -> None:
        """Let go of what this process keeps and does not use, so that it counts as free."""
        ...


class CudaMemory:
    """The memory of a CUDA device, through PyTorch.

    Args:
        torch: the module, which the caller has imported.
        device: index of the device.
    """

    def __init__(self, torch: Any, device: int = 0) -> None:
        self._torch = torch
        self._device = device

    def free_bytes(self) -> int:
        """What the driver has free, and what PyTorch keeps cached without using it."""
        cuda = self._torch.cuda
        driver_free_bytes, _ = cuda.mem_get_info(self._device)
        cached_bytes = cuda.memory_reserved(self._device) - cuda.memory_allocated(self._device)
        return int(driver_free_bytes) + int(cached_bytes)

    def give_back(self) -> None:
        """Collect garbage, which may hold tensors in cycles, then empty PyTorch's cache."""
        gc.collect()
        self._torch.cuda.empty_cache()


def cuda_memory(device: int = 0) -> CudaMemory | None:
    """The memory of a device, if this process has imported PyTorch and it sees one.

    It is not imported for this: that takes seconds and hundreds of megabytes.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or device >= torch.cuda.device_count():
        return None
    return CudaMemory(torch, device)
