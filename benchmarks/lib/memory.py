"""Budgets of GPU memory, enforced by torch's allocator, and what fills them.

A budget counts all that the process takes of the GPU: what torch's allocator holds, and what lies outside of it (the
CUDA context, kernels that were loaded, graphs).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

GIGA = 1e9
_MARGIN = 64 << 20
"""For what is loaded or instantiated outside of the allocator after a limit was set."""


@dataclass(frozen=True)
class Parts:
    """Peak of the memory of a GPU, in bytes, by what takes it.

    ``graphs`` are the pools of captured graphs, ``working`` all else that torch had allocated at its peak: activations,
    workspaces of libraries, buffers of a step. ``unused`` is what the allocator held besides.
    """

    weights: int
    cache: int
    graphs: int
    working: int
    unused: int
    outside: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.graphs + self.working + self.unused + self.outside

    def row(self) -> dict[str, float]:
        """Columns of a table, GB."""
        return {
            f"{name} GB": round(getattr(self, name) / GIGA, 2)
            for name in ("weights", "cache", "graphs", "working", "unused", "outside", "total")
        }


class Budget:
    """``size`` bytes of the current GPU while it is entered; what exceeds them is torch.OutOfMemoryError."""

    def __init__(self, size: int) -> None:
        self.size, self._peak = size, 0

    def limit(self) -> int:
        """Bytes that the allocator may hold so that the whole process stays within the budget."""
        return self.size - _outside() - _MARGIN

    def left(self) -> int:
        """Bytes that the allocator could have held besides, at the peak since the budget was entered last."""
        return max(0, self.limit() - self._peak)

    def __enter__(self) -> Budget:
        import torch

        free()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, self.limit() / total)))
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        import torch

        self._peak = torch.cuda.max_memory_reserved()
        torch.cuda.set_per_process_memory_fraction(1.0)

    def holds(self) -> bool:
        """Whether the peak since the budget was entered, with all that is outside of the allocator now, is within."""
        import torch

        return _outside() + torch.cuda.max_memory_reserved() <= self.size


def free() -> None:
    """Give memory that nothing uses back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocated_peak() -> int:
    """Bytes that torch had allocated at the most, pools of graphs included."""
    import torch

    return max(torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() + _graphs())


def parts(weights: int, cache: int) -> Parts:
    """What the memory's peak is made of, with so many bytes of weights and of cache."""
    import torch

    graphs, reserved = _graphs(), torch.cuda.max_memory_reserved()
    working = max(0, torch.cuda.max_memory_allocated() - weights - cache - graphs)
    unused = max(0, reserved - weights - cache - graphs - working)
    return Parts(weights, cache, graphs, working, unused, _outside())


def _outside() -> int:
    """Bytes of the GPU in use that torch's allocator does not hold. Only this process uses the GPU."""
    import torch

    available, total = torch.cuda.mem_get_info()
    return total - available - torch.cuda.memory_reserved()


def _graphs() -> int:
    """Bytes of the pools of captured graphs."""
    import torch

    segments = torch.cuda.memory_snapshot()
    return sum(one["total_size"] for one in segments if tuple(one.get("segment_pool_id", (0, 0))) != (0, 0))
