"""``vkvx export``: a checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import terminal
from vkvx.cli.limits import add_pixel_limits
from vkvx.errors import OptionError
from vkvx.format import QUANTIZERS, SCORE_CORRECTIONS

if TYPE_CHECKING:
    from vkvx.export.options import ExportOptions
    from vkvx.manifest import Manifest

DTYPES = ("float16", "bfloat16", "float32")
_PLAIN_OPTIONS = (
    "dtype",
    "bits",
    "key_bits",
    "value_bits",
    "bits_per_layer",
    "quantizer",
    "quantile_alpha",
    "score_correction",
    "tau",
    "correction_limit",
    "text_bits",
    "metrics_file",
    "opset",
    "min_pixels",
    "max_pixels",
    "cache_dir",
    "revision",
)


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "export",
        help="turn a checkpoint into a bundle",
        description="Turn a multimodal LLM into a bundle: ONNX graphs, weights, tokenizer, one manifest.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="an alias of `vkvx models` such as tiny-llava, a local directory, or a hub id"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="the bundle's directory (default: MODEL-Nbit here, or MODEL-mixed)"
    )
    parser.add_argument("--force", action="store_true", help="replace the output if it is a bundle")
    parser.add_argument("--dtype", choices=DTYPES, help="type of weights and activations (default: float16)")

    cache = parser.add_argument_group("visual cache")
    cache.add_argument("--bits", type=int, metavar="N", help="1, 2, 4, 8; or 16: not quantised (default: 1)")
    cache.add_argument("--key-bits", type=int, metavar="N", help="bits of the keys, where they differ")
    cache.add_argument("--value-bits", type=int, metavar="N", help="bits of the values, where they differ")
    cache.add_argument("--bits-per-layer", metavar="SPEC", help="for example 0-1:8,2-:1 (layers count from 0)")
    cache.add_argument(
        "--group-size", metavar="N", help="visual tokens that share scales, a multiple of 128, or auto (the default)"
    )
    cache.add_argument("--quantizer", choices=QUANTIZERS, help="how levels and codes are chosen (default: shaped)")
    cache.add_argument(
        "--quantile-alpha", type=float, metavar="A", help="with --quantizer quantile: the quantile of the outer levels"
    )
    cache.add_argument("--score-correction", choices=SCORE_CORRECTIONS, help="see docs/operator.md (default: expected)")
    cache.add_argument("--correction-limit", type=float, metavar="C", help="bound of 'expected' (default: 3)")
    cache.add_argument("--tau", type=float, metavar="T", help="shift of 'affine' (default: 3)")
    cache.add_argument(
        "--text-bits", type=int, metavar="N", help="of cached text tokens: 16, the type of --dtype (default), or 8"
    )
    cache.add_argument(
        "--metrics-file",
        "--metrics",
        metavar="FILE",
        help="what `vkvx calibrate` has recorded (default: weights alone)",
    )

    source = parser.add_argument_group("source and graph")
    source.add_argument("--opset", type=int, metavar="N", help="ONNX opset of the graphs (default: 18)")
    add_pixel_limits(source)
    source.add_argument("--cache-dir", metavar="DIR", help="where downloaded checkpoints are kept")
    source.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    source.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint's own Python code run")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Export, then say what was made."""
    from vkvx.export.bundle import export_model

    options = _options(args)
    output = Path(args.output) if args.output else _default_output(args.model, options)
    begun = time.perf_counter()
    with terminal.held_warnings("vkvx.export") as warnings, terminal.ProgressBar("export") as progress:
        manifest = export_model(args.model, output, options, progress)
    seconds = time.perf_counter() - begun
    for warning in warnings:
        terminal.note(f"warning: {warning}")
    if args.json:
        terminal.print_json({**_summary(output, manifest, seconds), "warnings": warnings})
    else:
        _print_summary(output, manifest, seconds)
    return 0


def _options(args: argparse.Namespace) -> ExportOptions:
    """What was given; everything else keeps the default of ExportOptions."""
    from vkvx.export.options import ExportOptions

    given = {name: getattr(args, name) for name in _PLAIN_OPTIONS if getattr(args, name) is not None}
    if {"bits", "key_bits", "value_bits"} <= set(given):
        raise OptionError("bits= (--bits) has no effect where key_bits= and value_bits= are given; leave it out")
    if args.group_size is not None:
        given["group_size"] = group_size(args.group_size)
    return ExportOptions(force=args.force, trust_remote_code=args.trust_remote_code, **given)


def group_size(text: str) -> str | int:
    """``--group-size``: "auto" or a number; OptionError."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"--group-size {text} is not supported: give auto, or a positive multiple of 128") from None


def _default_output(model: str, options: ExportOptions) -> Path:
    """``MODEL-2bit``; ``MODEL-mixed`` where layers, or keys and values, may differ: one number would not be true."""
    name = Path(model).name or "model"
    pair = {options.bits if bits is None else bits for bits in (options.key_bits, options.value_bits)}
    uniform = len(pair) == 1 and options.bits_per_layer is None
    return Path(f"{name}-{pair.pop()}bit" if uniform else f"{name}-mixed")


def _summary(output: Path, manifest: Manifest, seconds: float) -> dict[str, Any]:
    layout = manifest.layout
    packed, plain = layout.visual_bytes_per_picture(), layout.sixteen_bit_bytes_per_picture()
    return {
        "bundle": str(output),
        "bytes": sum(info.bytes for info in manifest.files.values()),
        "visual_bytes_per_picture": packed,
        "sixteen_bit_bytes_per_picture": plain,
        "compression": plain / packed,
        "bits_per_element": layout.bits_per_element(),
        "seconds": round(seconds, 3),
    }


def _print_summary(output: Path, manifest: Manifest, seconds: float) -> None:
    summary = _summary(output, manifest, seconds)
    picture = terminal.human_bytes(summary["visual_bytes_per_picture"])
    plain = terminal.human_bytes(summary["sixteen_bit_bytes_per_picture"])
    size, files = terminal.human_bytes(summary["bytes"]), len(manifest.files) + 1
    print(f"bundle        {output}")
    print(f"size          {size} in {files} files, made in {seconds:.1f} s")
    print(f"a picture     {picture} of cache; in 16 bits {plain}")
    print(f"compression   {summary['compression']:.1f} times, {summary['bits_per_element']:.2f} bits an element in all")
    print(f'next          vkvx run {output} "What is in this picture?" --image PICTURE')
