"""The memory of a simulated ComfyUI: models that stay until room is wanted, and what PyTorch keeps."""

from __future__ import annotations

from nodeagent.simulators._memory import GpuMemory

#: What a process holds for using the GPU at all, whatever it gives back.
CONTEXT_BYTES = 512 * 1024**2


class ModelCache:
    """Models on the GPU, the least recently used first, and memory to work with.

    Args:
        memory: the GPU; None computes on the CPU.
        reserve_bytes: left to others, as far as this cache's own doing goes.
    """

    def __init__(self, memory: GpuMemory | None, reserve_bytes: int) -> None:
        self._memory = memory
        self._reserve_bytes = reserve_bytes
        self._models: dict[str, int] = {}
        self._working_bytes = 0
        self._cached_bytes = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What is loaded, the least recently used first."""
        return tuple(self._models)

    @property
    def reserved_bytes(self) -> int:
        """What PyTorch holds."""
        return sum(self._models.values()) + self._working_bytes + self._cached_bytes

    @property
    def cached_bytes(self) -> int:
        """What PyTorch holds and nothing uses."""
        return self._cached_bytes

    def open(self) -> None:
        """Take what using the GPU takes. Raises SimulatedOutOfMemory."""
        self._hold()

    def load(self, name: str, model_bytes: int) -> None:
        """Have a model on the GPU; others make room for it. Raises SimulatedOutOfMemory."""
        if name in self._models:
            # The newest again.
            self._models[name] = self._models.pop(name)
            return
        self._make_room(model_bytes)
        self._models[name] = model_bytes
        try:
            self._hold()
        except BaseException:
            del self._models[name]
            raise

    def work(self, memory_bytes: int) -> None:
        """Take memory to work with; models other than the newest make room. Raises SimulatedOutOfMemory."""
        newest = self.names[-1:]
        self._make_room(memory_bytes, keep=newest)
        # What is cached is used again first.
        before = self._cached_bytes
        self._cached_bytes = max(before - memory_bytes, 0)
        self._working_bytes = memory_bytes
        try:
            self._hold()
        except BaseException:
            self._working_bytes, self._cached_bytes = 0, before
            raise

    def rest(self) -> None:
        """Give up the memory to work with, which PyTorch keeps for the next time."""
        self._cached_bytes += self._working_bytes
        self._working_bytes = 0

    def empty_cache(self) -> None:
        """Have PyTorch give back what nothing uses."""
        self._cached_bytes = 0
        self._hold()

    def unload_all(self) -> None:
        """Take all models off the GPU, and give everything back but the context."""
        self._models.clear()
        self._working_bytes = 0
        self.empty_cache()

    def _make_room(self, wanted_bytes: int, *, keep: tuple[str, ...] = ()) -> None:
        if self._memory is None:
            return
        while wanted_bytes > self._memory.free_bytes() + self._cached_bytes - self._reserve_bytes:
            oldest = next((name for name in self._models if name not in keep), None)
            if oldest is None:
                break
            del self._models[oldest]
            self._hold()
        if wanted_bytes > self._memory.free_bytes():
            self.empty_cache()

    def _hold(self) -> None:
        if self._memory is not None:
            self._memory.hold(CONTEXT_BYTES + self.reserved_bytes)
