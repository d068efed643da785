"""Driver: runs one benchmark, prints its table, and writes it with the environment as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

BENCHMARKS = {
    "unpack": "ways to unpack bit planes in onnxruntime on a CPU",
    "agreement": "onnxruntime against torch on tiny-llava, for every way to quantise its cache",
    "token_agreement": "equal tokens by the plug-in, a bundle and vkvx eval on pages of tiny-llava, float32",
    "methods": "ways to quantise the visual cache of tiny-llava that were tried, simulated densely",
    "stress": "every way to quantise a cache on cases with known answers, through the torch operator",
    "attention": "decode attention over the packed cache on a GPU, against torch on 16 bits",
    "decode": "decode steps of whole models in the torch backend, eager and captured, on a GPU",
    "pack": "quantise-and-pack of new visual tokens on a GPU",
    "prefill": "prefill attention on a GPU, against torch's flash attention",
}
"""Modules of this folder, with ``add_arguments(parser)`` and ``run(arguments)``, which returns the rows of a table."""
PACKAGES = ("numpy", "onnx", "onnxruntime", "torch", "transformers")
RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns are the keys of the first row."""
    texts = [[str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(rows[0]), *texts, strict=True)]
    for cells in (list(rows[0]), *texts):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def main(argv: list[str]) -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, summary in BENCHMARKS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        importlib.import_module(f"benchmarks.{name}").add_arguments(verb)
        verb.add_argument("-o", "--output", type=Path, help=f"JSON file (default benchmarks/results/{name}.json)")
    arguments = parser.parse_args(argv)
    rows = importlib.import_module(f"benchmarks.{arguments.name}").run(arguments)
    print_table(rows)
    output = arguments.output or RESULTS / f"{arguments.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("name", "output")}
    result = {"benchmark": arguments.name, "environment": environment(), "settings": settings, "results": rows}
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
