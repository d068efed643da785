"""Driver: runs one benchmark, prints its tables, and writes them as Markdown and with the environment as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.lib import gpu
from benchmarks.lib.tables import markdown
from vkvx.errors import VkvxError
from vkvx.storage import write_file

BENCHMARKS = {
    "unpack": "ways to unpack bit planes in onnxruntime on a CPU",
    "agreement": "onnxruntime against torch on tiny-llava, for every way to quantise its cache",
    "token_agreement": "equal tokens by the plug-in, a bundle and vkvx eval on pages of digits, float32",
    "http_server": "vkvx serve on tiny-llava, on a CPU: load, memory over many requests, and reuse of pictures",
    "beyond": "exact tokens, scales of tokens, more key bits and weighted values at 1 bit, on needles and tiny-llava",
    "calibration": "metrics from the weights and from recorded answers, on tiny-llava at 1 bit, by distance of queries",
    "methods": "ways to quantise the visual cache of tiny-llava that were tried, simulated densely",
    "stress": "every way to quantise a cache on cases with known answers, through the torch operator",
    "attention": "decode attention over the packed cache on a GPU, against other ways to do it",
    "breakeven": "from how many visual tokens on the packed cache is faster than 16 bits on a GPU",
    "chunked_prefill": "gaps between tokens on a GPU while long prompts arrive, whole and in pieces",
    "compiled_steps": "decode steps with projections apart, merged and compiled, on a GPU",
    "cut_cost": "what cutting prompts behind their pictures costs in accuracy, on tiny-llava, on a CPU",
    "decode": "decode steps of whole models in the torch backend, eager and captured, on a GPU",
    "export_shapes": "memory and time of exports of large models, from checkpoints of zeros that take no room",
    "few_rows": "decode attention of few rows with grouped heads on a GPU, caches cold, against torch's",
    "onnxruntime_steps": "decode steps of bundles in onnxruntime with the custom operator on a GPU, beside torch",
    "pack": "quantise-and-pack of new visual tokens on a GPU",
    "prefill": "prefill attention on a GPU, against torch's flash attention",
    "prefill_cost": "what quantising the pictures of a prompt adds to its prefill on a GPU, over 16 bits",
    "prompt_reuse": "a second question about a picture that a slot holds, on a GPU: time to the first token",
    "session_steps": "what a session adds to a decode step on a GPU: tokens chosen there and by the host",
    "text_rows": "decode attention over text rows of 16 and of 8 bits on a GPU",
    "throughput": "tokens a second of sessions and transformers in budgets of GPU memory, and a server's waiting times",
    "windows": "decode attention of layers with sliding windows and wide heads on a GPU, against torch's",
}
"""Modules of ``cases``, with ``add_arguments(parser)`` and ``run(arguments)``, which returns rows of
results, or gives all of them so far again and again, to be kept at once; they are the table unless there is
``tables(rows)``, which returns tables by title."""
FIGURES = {"plots": "figures of attention, breakeven and throughput from their JSON files; needs no GPU"}
"""Modules of the same form that measure nothing: ``run`` returns nothing."""
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
        **gpu.environment(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(argv: list[str]) -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, summary in (BENCHMARKS | FIGURES).items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        if name in argv:  # the others' imports take seconds
            importlib.import_module(f"benchmarks.cases.{name}").add_arguments(verb)
        if name in BENCHMARKS:
            verb.add_argument("-o", "--output", type=Path, help=f"JSON file (default benchmarks/results/{name}.json)")
    arguments = parser.parse_args(argv)
    module = importlib.import_module(f"benchmarks.cases.{arguments.name}")
    try:
        if arguments.name in FIGURES:
            module.run(arguments)
            return
        arguments.output = arguments.output or RESULTS / f"{arguments.name}.json"
        rows = module.run(arguments)
        for found in rows if isinstance(rows, Iterator) else [rows]:
            text = _write(module, found, arguments)
    except VkvxError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{text}\nwritten to {arguments.output} and {arguments.output.with_suffix('.md').name}")


def _write(module: ModuleType, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Write both files; returns the tables."""
    tables = module.tables(rows) if hasattr(module, "tables") else {"Results": rows}
    text = "\n".join(f"## {title}\n\n{markdown(table)}" for title, table in tables.items())
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("name", "output")}
    facts = environment()
    result = {"benchmark": arguments.name, "environment": facts, "settings": settings, "results": rows}
    write_file(output, json.dumps(result, indent=2) + "\n")
    where = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    write_file(output.with_suffix(".md"), f"# {BENCHMARKS[arguments.name]}\n\n{where}\n\n{text}")
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
