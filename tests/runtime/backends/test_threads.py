"""The default number of threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vkvx.runtime.backends.onnxruntime.threads import default_threads


@pytest.fixture
def eight_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of four cores with two hardware threads each: 0 and 4 share a core, and so on."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return tmp_path


def test_one_thread_a_core(eight_threads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = eight_threads / "none"
    assert default_threads(eight_threads, none) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 5})
    assert default_threads(eight_threads, none) == 2
    assert default_threads(none, none) == 3  # no topology: each CPU is a core


@pytest.mark.parametrize(
    ("limit", "threads"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("odd", 4)]
)
def test_containers_limit_it(eight_threads: Path, limit: str, threads: int) -> None:
    quota = eight_threads / "cpu.max"
    quota.write_text(limit + "\n")
    assert default_threads(eight_threads, quota) == threads


def test_here() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
