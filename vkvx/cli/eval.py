"""``vkvx eval``: what quantising the visual cache costs in accuracy."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import terminal
from vkvx.cli.export import DTYPES
from vkvx.cli.generation import PROVIDERS
from vkvx.errors import OptionError, VkvxError
from vkvx.evaluation.settings import FIELDS, option_name
from vkvx.format import BASELINE_BITS, QUANTIZERS, SCORE_CORRECTIONS

if TYPE_CHECKING:
    from vkvx.evaluation.sensitivity import Sensitivity
    from vkvx.export.options import ExportOptions

HELP = {
    "bits": f"bits of keys and values, such as 4,2,1 (default: 4,2,1; {BASELINE_BITS} always runs)",
    "key_bits": "bits of the keys, where they differ",
    "value_bits": "bits of the values, where they differ",
    "bits_per_layer": "for example 0-1:8,2-:1; repeat the option for several",
    "group_size": "visual tokens that share scales, or auto",
    "quantizer": f"some of {','.join(QUANTIZERS)}",
    "quantile_alpha": "with the quantizer quantile",
    "score_correction": f"some of {','.join(SCORE_CORRECTIONS)}",
    "tau": "with the score correction affine",
    "correction_limit": "with the score correction expected",
    "text_bits": "of cached text tokens: 16 or 8 (default: 16)",
    "metrics_file": "files of `vkvx calibrate`, for shaped (default: metrics of the weights)",
}
"""What to say of the fields of ExportOptions that are options here."""
REPEATED = ("bits_per_layer",)
METRICS = "exact,anls,f1,cider,vqa,relaxed,contains,contains-formula"
EXAMPLES = 6
"""Samples that a report shows."""


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "eval",
        help="measure what quantising costs in accuracy",
        description="Run a checkpoint in torch under several settings of its visual cache, or a bundle in onnxruntime,"
        " on questions with known answers; compare with 16 bits.",
    )
    parser.add_argument("target", metavar="TARGET", help="a checkpoint (alias, directory, hub id) or a bundle")

    task = parser.add_argument_group("task")
    task.add_argument("--task", metavar="NAME", help="digits, the default: pages that tiny-llava reads")
    task.add_argument("--data", metavar="FILE", help='lines of {"image": PATH, "prompt": TEXT, "answers": [TEXT, ...]}')
    task.add_argument("--samples", type=int, metavar="N", help="the first N (default: 100 pages, all of a file)")
    task.add_argument("--metrics", metavar="LIST", help=f"with --data: of {METRICS} (default: exact,f1)")
    task.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="answer's length (default: 64)")

    settings = parser.add_argument_group("settings", "lists are comma-separated; all combinations run")
    for name in FIELDS:
        action, metavar = ("append", "SPEC") if name in REPEATED else ("store", "LIST")
        settings.add_argument(option_name(name), action=action, metavar=metavar, help=HELP.get(name, "as in export"))
    settings.add_argument(
        "--setting",
        action="append",
        metavar="SPEC",
        help='one more setting: "bits=1,quantizer=minmax"; may be repeated',
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=PROVIDERS, default="auto", help="default: a GPU if there is one")
    machine.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    machine.add_argument("--batch", type=int, default=8, metavar="N", help="samples at a time (default: 8)")
    machine.add_argument("--model", metavar="MODEL", help="a bundle's checkpoint (default: what its manifest names)")
    machine.add_argument("--no-reference", action="store_true", help="run a bundle without its checkpoint")
    machine.add_argument("--cut-after-pictures", action="store_true", help="cut a bundle's prompts, as in `vkvx run`")

    layers = parser.add_argument_group("sensitivity of layers")
    layers.add_argument("--sensitivity", action="store_true", help="raise single layers; suggest --bits-per-layer")
    layers.add_argument("--budget", type=float, metavar="B", help="bits an element that the suggestion may take")

    results = parser.add_argument_group("results")
    results.add_argument("-o", "--output", metavar="FILE", help="keep a record a sample; the same command goes on")
    results.add_argument("--force", action="store_true", help="replace a report, and records of another evaluation")
    results.add_argument("--json", action="store_true", help="print the result as JSON")
    results.add_argument("--html", metavar="FILE", help="write a report")
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table."""
    if args.sensitivity:
        return _sensitivity(args)
    if args.budget is not None:
        raise OptionError("--budget has no effect without --sensitivity; leave it out, or give that as well")
    if args.force and args.output is None and args.html is None:
        raise OptionError("--force has no effect without --output or --html; leave it out, or give one of them")
    if args.html is not None:  # before anything runs: what cannot be written is told at once
        from vkvx.evaluation.html import check_report, write_html

        if args.output is not None and Path(args.html).resolve() == Path(args.output).resolve():
            raise OptionError("--html and --output name the same file; give each its own")
        check_report(Path(args.html), args.force)
    from vkvx.evaluation import evaluate
    from vkvx.evaluation.report import table

    with _Progress(args) as progress:
        result = evaluate(
            args.target,
            args.task,
            settings(args),
            metrics=None if args.metrics is None else [name.strip() for name in args.metrics.split(",")],
            model=args.model,
            reference=not args.no_reference,
            cut_after_pictures=args.cut_after_pictures,
            examples=0 if args.html is None else EXAMPLES,
            **_common(args, progress),
        )
    if args.json:
        terminal.print_json(result.to_json())
    else:
        print("\n".join(table(result)))
    if args.html is not None:  # last, so that nothing is lost if the disk is full by now
        sys.stdout.flush()
        command = shlex.join(["vkvx", *args.arguments])
        try:
            write_html(result.to_json(), Path(args.html), examples=result.examples, command=command)
        except VkvxError as error:  # told here, so that stdout stays what it is
            terminal.note(f"vkvx: error: {error}; only the report is missing")
            return 2
    return 0


def settings(args: argparse.Namespace) -> list[ExportOptions] | None:
    """The settings that the options name; None if there are none."""
    from vkvx.evaluation.settings import parse_setting, parse_value, parse_values, product

    values = {}
    for name in FIELDS:
        given = getattr(args, name)
        if given is not None:
            values[name] = (
                [parse_value(name, text) for text in given] if name in REPEATED else parse_values(name, given)
            )
    explicit = [parse_setting(text) for text in args.setting or ()]
    if not values:
        return explicit or None
    return [*product(values), *explicit]


def _sensitivity(args: argparse.Namespace) -> int:
    for name in ("metrics", "model", "html"):
        if getattr(args, name) is not None:
            raise OptionError(f"--{name} has no effect with --sensitivity; leave it out")
    if args.force and args.output is None:
        raise OptionError("--force has no effect without --output; leave it out, or give both")
    if args.cut_after_pictures:
        raise OptionError("--cut-after-pictures is for a bundle, and --sensitivity for a checkpoint; leave one out")
    if args.no_reference:
        raise OptionError("--sensitivity compares with the 16-bit model; leave out --no-reference")
    from vkvx.evaluation.sensitivity import measure_sensitivity

    given = settings(args) or []
    if any(entry.bits == BASELINE_BITS for entry in given):
        raise OptionError("--bits 16 has no effect with --sensitivity, which always compares with it; leave it out")
    if len(given) > 1:
        raise OptionError(f"--sensitivity starts from one setting, not from {len(given)}; give one value an option")
    with _Progress(args) as progress:
        base = given[0] if given else None
        result = measure_sensitivity(args.target, args.task, base, budget=args.budget, **_common(args, progress))
    if args.json:
        terminal.print_json(result.to_json())
    else:
        print("\n".join(_sensitivity_lines(result)))
    return 0


def _sensitivity_lines(result: Sensitivity) -> list[str]:
    from vkvx.evaluation.report import align, count_samples

    rows = [
        (str(s.layer), str(s.bits), f"{s.kl:.3e}", f"{s.gain:.3e}", f"{s.added:.3f}", f"{s.gain / s.added:.3e}")
        for s in result.steps
    ]
    lines = [
        f"{result.target} ({result.device}, {result.dtype}), {result.task}: {count_samples(result.samples)}",
        f"base: {result.base}; KL {result.kl:.3e}, {result.bits_per_element:.2f} bits per element",
        "",
        *align(("layer", "bits", "KL", "gain", "added bits", "gain a bit"), rows),
        "",
    ]
    if result.bits_per_layer is None:
        return [*lines, f"no step that gains anything fits into {result.budget:.2f} bits per element"]
    taken = f"{result.chosen_bits_per_element:.2f} of {result.budget:.2f} bits per element"
    return [*lines, f"--bits {result.bits} --bits-per-layer {result.bits_per_layer}    ({taken})"]


def _common(args: argparse.Namespace, progress: terminal.ProgressBar) -> dict[str, Any]:
    """Arguments that both kinds of run take."""
    names = ("data", "samples", "device", "dtype", "batch", "max_new_tokens", "output")
    force = args.force and args.output is not None
    return {**{name: getattr(args, name) for name in names}, "force": force, "progress": progress}


class _Progress(terminal.ProgressBar):
    """Says, when interrupted, that the records are kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__("eval")
        self._output = args.output

    def __exit__(self, kind: object, *rest: object) -> None:
        super().__exit__(kind, *rest)
        if isinstance(kind, type) and issubclass(kind, KeyboardInterrupt) and self._output:
            terminal.note(f"what is done is in {self._output}; the same command goes on from there")
