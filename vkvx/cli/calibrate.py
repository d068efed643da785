"""``vkvx calibrate``: records a model's own queries, for metrics of the quantiser ``shaped``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vkvx.cli import terminal
from vkvx.cli.export import DTYPES
from vkvx.cli.generation import PROVIDERS


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "calibrate",
        help="record a model's queries, for the metrics of shaped",
        description="Let a checkpoint answer questions about pictures and record what its queries look like and what "
        "they attend to: `vkvx export --metrics FILE` makes its metrics of that. The same command goes on where it "
        "ended, with more --samples, too.",
    )
    parser.add_argument("model", metavar="MODEL", help="an alias, a local directory, or a hub id")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="what is recorded (default: MODEL-metrics.safetensors here)"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help='lines of {"image": PATH, "prompt": TEXT}; with "answers" the first of them counts in place of the '
        "model's own (default of bundled models: pages that they were trained on)",
    )
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="the first N (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="answer's length (default: 64)")
    parser.add_argument("--device", choices=PROVIDERS, default="auto", help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--force", action="store_true", help="start anew in place of a file of another run")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Record, then say what there is."""
    from vkvx.evaluation.calibration import calibrate

    output = args.output or f"{Path(args.model).name or 'model'}-metrics.safetensors"
    names = ("data", "samples", "device", "dtype", "max_new_tokens", "force")
    with _Progress(output) as progress:
        done = calibrate(args.model, output, progress=progress, **{name: getattr(args, name) for name in names})
    if args.json:
        terminal.print_json(done.to_json())
        return 0
    print(f"metrics       {done.path}, {terminal.human_bytes(Path(done.path).stat().st_size)}")
    print(f"recorded      {done.samples} answers of {done.tokens} tokens to {done.data}, {done.recorded} of them now")
    print(f"next          vkvx export {args.model} --metrics {done.path}")
    return 0


class _Progress(terminal.ProgressBar):
    """Says, when interrupted, that what is recorded is kept."""

    def __init__(self, output: str) -> None:
        super().__init__("calibrate")
        self._output = output

    def __exit__(self, kind: object, *rest: object) -> None:
        super().__exit__(kind, *rest)
        if isinstance(kind, type) and issubclass(kind, KeyboardInterrupt) and Path(self._output).exists():
            terminal.note(f"what is recorded is in {self._output}; the same command goes on from there")
