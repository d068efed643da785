"""``vkvx validate``: a bundle in onnxruntime against the torch model that it was made from, or engines against it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import terminal
from vkvx.cli.generation import PROVIDERS, load_pictures
from vkvx.errors import OptionError

if TYPE_CHECKING:
    from vkvx.runtime.checks.report import Check, Report


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "validate",
        help="compare a bundle with its torch model",
        description="Run a bundle in onnxruntime and its checkpoint in torch on the same pictures and text, and compare"
        " vision output, logits and caches over prefill, decode and a second turn. With --backend tensorrt or rtx the"
        " engines of the bundle are compared with onnxruntime. Exit code 1: something differs.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle")
    parser.add_argument(
        "--backend",
        choices=("onnxruntime", "tensorrt", "rtx"),
        default="onnxruntime",
        help="what is compared: the bundle in onnxruntime, or its engines (default: onnxruntime)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="the checkpoint, or BUNDLE for its own weights (default: what the manifest names)",
    )
    parser.add_argument(
        "--image", action="append", metavar="PATH", help="picture to use, - from stdin; may be repeated"
    )
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="decode steps to compare (default: 8)")
    parser.add_argument("--atol", type=float, metavar="X", help="absolute tolerance in place of the built-in ones")
    parser.add_argument("--rtol", type=float, metavar="X", help="tolerance relative to the largest reference value")
    parser.add_argument("--provider", choices=PROVIDERS, default="auto", help="of onnxruntime (default: auto)")
    parser.add_argument("--per-layer", action="store_true", help="one line for each tensor of each layer")
    parser.add_argument(
        "--save-inputs", metavar="FILE", help="write the inputs of each decoder call, as JSON that Polygraphy reads"
    )
    parser.add_argument("--save-outputs", metavar="FILE", help="write what the backend made of them, the same way")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compare; 0 if all is within tolerance, else 1."""
    from vkvx.runtime.checks.validate import validate_bundle

    if args.steps < 1:
        raise OptionError(f"--steps {args.steps} is not supported: give at least 1")
    if args.json and args.per_layer:
        raise OptionError("--per-layer has no effect with --json, which has each layer; leave it out")
    with terminal.ProgressBar("validate") as progress:
        report = validate_bundle(
            Path(args.bundle),
            model=args.model,
            images=load_pictures(args.image or ()),
            steps=args.steps,
            atol=args.atol,
            rtol=args.rtol,
            provider=args.provider,
            progress=progress,
            backend=args.backend,
            save_inputs=args.save_inputs,
            save_outputs=args.save_outputs,
        )
    if args.json:
        terminal.print_json(report.to_json())
    else:
        print("\n".join(_lines(report, args.per_layer)))
    return 0 if report.passed else 1


def _lines(report: Report, per_layer: bool) -> list[str]:
    checks = list(report.checks) if per_layer else worst_of_layers(report.checks)
    lines = [_line(check) for check in checks]
    failed = sum(not check.passed for check in report.checks)
    if report.passed:
        lines.append(f"all {len(report.checks)} comparisons are within tolerance")
    else:
        lines.append(f"{failed} of {len(report.checks)} comparisons are out of tolerance")
        if report.first_divergence is not None:
            lines.append(f"{report.first_divergence} is the first that diverges")
        lines += [report.remedy] if report.remedy else []
    return lines


def worst_of_layers(checks: list[Check]) -> list[Check]:
    """One check for each tensor and phase: the first that fails, else the one nearest to its tolerance."""

    def badness(check: Check) -> tuple[bool, float]:
        return not check.passed, check.max_difference / check.tolerance if check.tolerance else check.max_difference

    chosen: dict[tuple[str, str], Check] = {}
    for check in checks:
        key = check.phase, check.name
        if key not in chosen or (chosen[key].passed and badness(check) > badness(chosen[key])):
            chosen[key] = check
    return list(chosen.values())


def _line(check: Check) -> str:
    mark = "✓" if check.passed else "✗"
    name = check.name if check.layer is None else f"{check.name}, layer {check.layer}"
    figures = f"difference {check.max_difference:<9.3g} tolerance {check.tolerance:<9.3g}"
    return f"{mark} {check.phase:<16} {name:<32} {figures} {check.detail}".rstrip()
