"""Running a command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def run_process(
    *arguments: object, stdin: str = "", cwd: Path | None = None, environment: dict[str, str] | None = None
) -> Result:
    """Run ``vkvx`` as a shell would, with this text on its standard input."""
    done = subprocess.run(
        [sys.executable, "-m", "vkvx", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        timeout=600,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def listing(folder: Path) -> list[str]:
    """Every path below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
