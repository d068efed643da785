"""How many threads to compute with."""

from __future__ import annotations

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads(cpus: Path = _CPUS, quota: Path = _QUOTA) -> int:
    """Physical cores that this process may use: its CPU affinity, one a core, within the limit of its container."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 1) // 2)
    cores = {_core(cpus, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _limit(quota)))


def _core(cpus: Path, cpu: int) -> str:
    """A name that the hardware threads of one core share."""
    try:
        return (cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _limit(quota: Path) -> int:
    """Whole CPUs that the cgroup's bandwidth limit allows."""
    try:
        limit, period = quota.read_text().split()
        return 1 << 16 if limit == "max" else max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return 1 << 16
