"""Main memory: how much is free, and how much the process has taken at most. Linux; unknown (None) elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


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
    left = max(0, int(most) - used + cached)  # the cache of files makes room
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
