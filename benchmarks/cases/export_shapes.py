"""Memory and time of exports: each in a process of its own, from a checkpoint of the right shapes.

Weights are zeros in sparse files. An export reads, hashes and copies them like others; the bundle takes its full size
unless the file system shares blocks of copies (Btrfs, XFS), and is deleted after each export.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vkvx.errors import StorageError
from vkvx.models.presets import PRESETS

DEFAULT = ("qwen3-vl-8b", "gemma3-27b", "internvl3-38b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=DEFAULT, help="sizes of models")
    parser.add_argument("--bits", type=int, default=1, help="bits of the visual cache (default 1)")
    parser.add_argument("--folder", help="where checkpoints and bundles are made (default: of temporary files)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of each model; a bundle that does not fit on the disk has its reason in the row."""
    rows = []
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            # A fresh interpreter: what it holds is what `vkvx export` would.
            with get_context("spawn").Pool(1) as pool:
                weights = pool.apply(_write, (preset, folder))
            with get_context("spawn").Pool(1) as pool:
                row = pool.apply(_export, (folder, arguments.bits))
        rows.append({"model": preset, "bits": arguments.bits, "weights GB": round(weights / 1e9, 1), **row})
        print(rows[-1], flush=True)
    return rows


def _write(preset: str, folder: str) -> int:
    from vkvx.models.presets import preset_config
    from vkvx.models.random_checkpoint import write_checkpoint

    return write_checkpoint(Path(folder) / "checkpoint", preset_config(preset), sparse=True)


def _export(folder: str, bits: int) -> dict[str, Any]:
    """Peak memory in MiB, seconds of processors, and seconds of each stage."""
    from vkvx.export.bundle import export_model
    from vkvx.export.options import ExportOptions
    from vkvx.storage import can_share_blocks

    begun: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        begun.setdefault(stage, time.perf_counter())

    checkpoint, output = Path(folder) / "checkpoint", Path(folder) / "bundle"
    shared = can_share_blocks(next(checkpoint.glob("*.safetensors")), Path(folder))
    first = time.perf_counter()
    note = ""
    try:
        export_model(checkpoint, output, ExportOptions(bits=bits), progress)
    except StorageError as error:
        note = str(error)
    last = time.perf_counter()
    shutil.rmtree(output, ignore_errors=True)
    ends = [*begun.values(), last][1:]
    stages = {stage: end - start for (stage, start), end in zip(begun.items(), ends, strict=True)}
    total = last - first
    return {
        "peak MiB": _peak_memory(),
        "s": round(total, 1),
        "s of CPU": round(time.process_time(), 1),
        "s but weights": round(total - stages.get("weights", 0.0), 1),
        **{
            f"{stage} s": round(stages.get(stage, 0.0), 1)
            for stage in ("load", "decoder", "vision", "weights", "finish")
        },
        "weights are": "shared and hashed" if shared else "copied and hashed",
        "note": note,
    }


def _peak_memory() -> int:
    """The most memory that this process held, in MiB. (getrusage would count that of its parent, too.)"""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024
