"""How far onnxruntime and torch are apart on the whole of tiny-llava, for each way to quantise its cache.

One row a setting: two pages in two turns, each with a prefill and ``--steps`` decode steps, as in ``vkvx validate``.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from vkvx import ExportOptions, export_model, validate_bundle
from vkvx.format import BITS, QUANTIZERS, SCORE_CORRECTIONS
from vkvx.runtime.checks.report import Check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--steps", type=int, default=64, help="decode steps after each prefill (default 64)")
    parser.add_argument("--dtypes", default="float16,float32", help="dtypes to export (default float16,float32)")
    parser.add_argument("--bits", default="1,2,4,8,16", help="bits to export (default 1,2,4,8,16)")


def settings(bits: int) -> list[dict[str, str]]:
    """Quantisers and score corrections to run at so many bits."""
    if bits not in BITS:
        return [{}]
    return [{"quantizer": q, "score_correction": c} for q, c in itertools.product(QUANTIZERS, SCORE_CORRECTIONS)]


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Export and compare each setting."""
    rows = []
    for dtype in arguments.dtypes.split(","):
        for bits in map(int, arguments.bits.split(",")):
            for options in settings(bits):
                with tempfile.TemporaryDirectory() as directory:
                    bundle = Path(directory) / "bundle"
                    export_model("tiny-llava", bundle, ExportOptions(dtype=dtype, bits=bits, **options))
                    report = validate_bundle(bundle, steps=arguments.steps)
                columns = {"quantizer": "-", "score_correction": "-", **options}
                rows.append({"dtype": dtype, "bits": bits, **columns, **_summary(report.checks)})
                print(*rows[-1].values(), flush=True)
    return rows


def _summary(checks: list[Check]) -> dict[str, Any]:
    """Logits relative to their range, how near the packed cache comes to its tolerances, and what failed."""
    # The tolerance of logits is a multiple of their range, which ``detail`` tells.
    logits = [c.max_difference / float(c.detail.split(",")[0].split()[-1]) for c in checks if c.name == "logits"]
    # After a prefill only: then the bundle takes over the reference's cache.
    held = [c for c in checks if c.name.startswith("visual_") and c.phase.endswith("prefill") and c.tolerance]
    packed = max((c.max_difference / c.tolerance for c in held), default=0.0)
    failed = [f"{c.phase} {c.name} {c.layer}" for c in checks if not c.passed]
    return {
        "calls": len(logits),
        "logits_worst": f"{max(logits):.2g}",
        "logits_median": f"{sorted(logits)[len(logits) // 2]:.2g}",
        "packed_worst": f"{packed:.2g}",
        "failed": len(failed),
        "first_failed": failed[0] if failed else "",
    }
