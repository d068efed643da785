"""``vkvx check``: whether a model can be exported, before its weights are downloaded."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vkvx.cli import terminal
from vkvx.cli.limits import add_pixel_limits
from vkvx.errors import OptionError

if TYPE_CHECKING:
    from vkvx.runtime.checks.check import ModelCheck

DTYPES = ("float16", "bfloat16", "float32")


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "check",
        help="say whether a model can be exported, and what its pictures take",
        description="From a model's config and processor files alone: whether it can be exported, and tokens and bytes "
        "of pictures. Weights are not downloaded. Exit code 1 if it cannot be exported.",
    )
    parser.add_argument("model", metavar="MODEL", help="as in `vkvx export`")
    parser.add_argument(
        "--picture",
        action="append",
        metavar="WIDTHxHEIGHT",
        help="size in pixels; may be given again (default: 1024x1024, 1280x960, 1920x1080, 1240x1754)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the cache at 16 bits (default: float16)")
    parser.add_argument("--group-size", default="auto", metavar="N", help="a multiple of 128, or auto (the default)")
    add_pixel_limits(parser)
    parser.add_argument("--cache-dir", metavar="DIR", help="where downloaded checkpoints are kept")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint's own Python code run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read config and processor, print what they tell; 1 if the model cannot be exported."""
    from vkvx.cli.export import group_size
    from vkvx.runtime.checks.check import DEFAULT_PICTURES, check_model

    found = check_model(
        args.model,
        DEFAULT_PICTURES if args.picture is None else [_size(text) for text in args.picture],
        dtype=args.dtype,
        group_size=group_size(args.group_size),
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        cache_dir=args.cache_dir,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        terminal.print_json(asdict(found))
    else:
        print("\n".join(_lines(found)))
    return 0 if found.supported else 1


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text, re.ASCII)
    if match is None:
        raise OptionError(f"--picture {text} is not understood: give width and height in pixels, such as 1280x960")
    return int(match[1]), int(match[2])


def _lines(found: ModelCheck) -> list[str]:
    if found.model is None:
        return [f"{found.name} cannot be exported: {found.reason}"]
    model, bits = found.model, found.pictures[0].bytes
    rows = [("picture", "tokens", "in groups", *("1 bit" if number == 1 else f"{number} bits" for number in bits))]
    for picture in found.pictures:
        rows.append(
            (
                *(f"{picture.width}x{picture.height}", f"{picture.tokens:,}", f"{picture.padded_tokens:,}"),
                *(terminal.human_bytes(count) for count in picture.bytes.values()),
            )
        )
    return [
        f"{found.name} can be exported",
        f"family       {found.family}: {model.architecture}",
        f"decoder      {found.decoder}: {len(model.layers)} layers, "
        f"{terminal.heads([vars(layer) for layer in model.layers], model.query_heads)}, "
        f"{model.max_positions:,} positions",
        f"group size   {found.group_size} visual tokens",
        "",
        *terminal.columns(rows),
        "",
        "in groups: visual tokens with the padding to whole groups, which 16 bits have not.",
        f"bits: bytes of a picture in the cache, with scales, offsets and padding; at 16 bits in {model.dtype}.",
    ]
