"""Main memory: how much is free or was taken at most, on Linux; None if unknown."""

from __future__ import annotations

import re
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
MEMORY_BASE = 400 << 20
"""Bytes of main memory that a build takes whatever the size of the model: Python, TensorRT, its compiler."""
MEMORY_BASE_WHOLE = 4600 << 20
"""The same for TensorRT 8.6, which writes no streams and loads kernels for every kind of GPU."""
MEMORY_PER_WEIGHT = 2.6
"""Bytes that a build takes for each byte of the larger engine's weights; one more where engines are not streamed."""
MEMORY_PER_PLAIN_LAYER = 300 << 20
"""Bytes that a decoder layer takes whose attention is spelt out in standard layers."""


def build_memory(weights: int, *, streams: bool = True, plain_layers: int = 0) -> int:
    """Bytes of main memory that building an engine takes at most, from the bytes of its weights.

    ``streams``: the library writes engines as a stream. ``plain_layers``: decoder layers without the plugin.
    """
    base, per_weight = (MEMORY_BASE, MEMORY_PER_WEIGHT) if streams else (MEMORY_BASE_WHOLE, MEMORY_PER_WEIGHT + 1)
    return int(base + per_weight * weights + MEMORY_PER_PLAIN_LAYER * plain_layers)


def available_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Bytes that the process may still take: what the system has left, and its control group (version 2) allows."""
    free = _kilobytes(proc / "meminfo", "MemAvailable")
    try:
        most, used = (cgroup / "memory.max").read_text().strip(), int((cgroup / "memory.current").read_text())
        stat = (cgroup / "memory.stat").read_text()
    except (OSError, ValueError):  # no control group, or of version 1
        return free
    if most == "max":
        return free
    cached = sum(int(found) for found in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))
    left = max(0, int(most) - used + cached)  # the cache of files gives way
    return left if free is None else min(free, left)


def peak_memory(proc: Path = _PROC) -> int | None:
    """Most bytes that the process has had in main memory so far."""
    return _kilobytes(proc / "self" / "status", "VmHWM")


def _kilobytes(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
