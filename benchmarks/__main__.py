"""Driver: runs one benchmark, prints its table, and writes it with the environment as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

BENCHMARKS = {"unpack": "ways to unpack bit planes in onnxruntime on a CPU"}
PACKAGES = ("numpy", "onnx", "onnxruntime")
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
        **{name: metadata.version(name) for name in PACKAGES},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns are the keys of the first row."""
    texts = [[str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(rows[0]), *texts, strict=True)]
    for cells in (list(rows[0]), *texts):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS, help="; ".join(f"{k}: {v}" for k, v in BENCHMARKS.items()))
    parser.add_argument("--repeats", type=int, default=50, help="runs of each variant (default 50)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of an operator (default: all)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file (default benchmarks/results/NAME.json)")
    arguments = parser.parse_args()
    rows = importlib.import_module(f"benchmarks.{arguments.name}").run(arguments.repeats, arguments.threads)
    print_table(rows)
    output = arguments.output or RESULTS / f"{arguments.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"repeats": arguments.repeats, "threads": arguments.threads}
    result = {"benchmark": arguments.name, "environment": environment(), "settings": settings, "results": rows}
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
