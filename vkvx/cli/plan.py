"""``vkvx plan``: what a model takes on a GPU, before its weights are downloaded."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vkvx.cli import terminal
from vkvx.cli.limits import add_pixel_limits
from vkvx.errors import OptionError

if TYPE_CHECKING:
    from vkvx.runtime.checks.plan import Plan

DTYPES = ("float16", "bfloat16", "float32")


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plan",
        help="show which batch and context fit on a GPU",
        description="From a model's config alone: bytes of weights and cache, and the largest batch and context that "
        "fit on a GPU. Weights are not downloaded.",
    )
    parser.add_argument("model", metavar="MODEL", help="as in `vkvx export`")
    parser.add_argument(
        "--gpu-memory", required=True, metavar="SIZE", help="memory of the GPU, for example 24GiB or 80GB"
    )
    parser.add_argument("--bits", default="16,4,2,1", metavar="LIST", help="to compare (default: 16,4,2,1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the weights (default: float16)")
    parser.add_argument("--group-size", default="auto", metavar="N", help="a multiple of 128, or auto (the default)")
    parser.add_argument(
        "--text-bits", type=int, default=16, metavar="N", help="of text beside packed pictures: 16 (default) or 8"
    )
    parser.add_argument("--pictures", type=int, default=1, metavar="N", help="in one sequence (default: 1)")
    parser.add_argument("--text-tokens", type=int, default=1024, metavar="N", help="in one sequence (default: 1024)")
    parser.add_argument("--tokens-per-picture", type=int, metavar="N", help="where the model's pictures vary in size")
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the memory, kept for the driver, activations and workspaces (default: 0.1)",
    )
    add_pixel_limits(parser)
    parser.add_argument("--cache-dir", metavar="DIR", help="where downloaded checkpoints are kept")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint's own Python code run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read the config, count parameters and bytes, print the table."""
    from vkvx.cli.export import group_size
    from vkvx.options import QuantizationOptions
    from vkvx.runtime.checks.plan import plan_model

    memory = terminal.parse_bytes(args.gpu_memory, "--gpu-memory")
    plan = plan_model(
        args.model,
        memory,
        dtype=args.dtype,
        options=QuantizationOptions(group_size=group_size(args.group_size), text_bits=args.text_bits),
        bits=_bits(args.bits),
        pictures=args.pictures,
        text_tokens=args.text_tokens,
        tokens_per_picture=args.tokens_per_picture,
        reserve=args.reserve,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        cache_dir=args.cache_dir,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        extra = {"weights": plan.weights, "cache": plan.cache, "build_memory": _build_memory(plan)}
        terminal.print_json({**asdict(plan), **extra})
    else:
        print("\n".join(_lines(plan)))
    return 0


def _build_memory(plan: Plan) -> int:
    from vkvx.runtime.engines.memory import build_memory

    return build_memory(max(plan.decoder_bytes, plan.vision_bytes))


def _bits(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--bits {text} is not understood: give a list such as 16,4,2,1") from None


def _lines(plan: Plan) -> list[str]:
    model, size = plan.model, terminal.human_bytes
    header = ("bits", "a picture", "visual token", "text token", "a sequence", "sequences", "break-even", "pictures")
    table = [header]
    for row in plan.rows:
        table.append(
            (
                str(row.bits),
                size(row.bytes_per_picture),
                size(row.bytes_per_visual_token),
                size(row.bytes_per_text_token),
                size(row.bytes_per_slot),
                f"{row.max_slots:,}",
                f"{row.break_even_slots:,}",
                f"{row.max_pictures:,} ({row.limited_by})",
            )
        )
    build = f"{size(_build_memory(plan))} of main memory to build the engines (`vkvx build`)"
    return [
        f"model        {model.name}: {model.architecture}, {model.dtype}, {len(model.layers)} layers, "
        f"{terminal.heads([vars(layer) for layer in model.layers], model.query_heads)}",
        f"weights      {size(plan.weights)}: decoder {size(plan.decoder_bytes)}, vision {size(plan.vision_bytes)}",
        f"build        {'no engines of linear attention are built' if model.linear_layers else build}",
        f"GPU          {size(plan.memory)}: {size(plan.reserve)} in reserve, {size(plan.cache)} for the cache",
        f"a sequence   {plan.pictures} x {plan.tokens_per_picture} visual tokens, {plan.text_tokens} text tokens",
        "",
        *terminal.columns(table),
        "",
        "sequences: how many fit side by side.",
        "break-even: from this many sequences on, a decode step reads more cache than decoder weights.",
        f"pictures: most in one sequence, with {plan.text_tokens} text tokens; what ends it in brackets.",
    ]
