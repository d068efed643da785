"""Options and reports that ``run`` and ``chat`` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from vkvx.cli import terminal
from vkvx.cli.limits import add_pixel_limits
from vkvx.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vkvx.manifest import Manifest
    from vkvx.runtime.sessions.conversation import Conversation
    from vkvx.runtime.sessions.processor import Processor
    from vkvx.runtime.sessions.sampling import GenerationOptions
    from vkvx.runtime.sessions.session import Session

BACKENDS = ("auto", "onnxruntime", "torch", "tensorrt", "rtx")
PROVIDERS = ("auto", "cpu", "cuda")
OPTIONS = (
    *("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "seed", "stop", "min_pixels", "max_pixels", "fps"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of sampling, of the machine, and of the cache's size."""
    sampling = parser.add_argument_group("sampling", "Defaults are the checkpoint's, see `vkvx inspect`; else these.")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N", help="answer's length (default: 256)")
    sampling.add_argument("--min-new-tokens", type=int, metavar="N", help="do not end the answer before (default: 0)")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token (default: 0)")
    above = "with a temperature above 0:"
    sampling.add_argument("--top-k", type=int, metavar="K", help=f"{above} sample among the K likeliest (0: all)")
    sampling.add_argument("--top-p", type=float, metavar="P", help=f"{above} sample among the likeliest of share P")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: repeat less")
    sampling.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens follow each other twice (default: 0, off)"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help=f"{above} seed of the sampling (default: 0)")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be repeated")
    sampling.add_argument(
        "--no-checkpoint-defaults",
        action="store_true",
        help="leave out what the checkpoint's generation_config.json asks for",
    )

    pictures = parser.add_argument_group("pictures and videos")
    add_pixel_limits(pictures)
    pictures.add_argument(
        "--fps",
        type=float,
        metavar="N",
        help="frames a second to take of a video file (default: the model's), or that a folder of frames has",
    )

    add_machine_options(parser.add_argument_group("machine"))


def add_machine_options(machine: Any) -> None:
    """What runs a bundle, and the size of its cache: a group of options, which ``serve`` has, too."""
    machine.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="auto: engines of `vkvx build` for this GPU, torch on a GPU with `vkvx plugin build`, else onnxruntime",
    )
    machine.add_argument("--provider", choices=PROVIDERS, default="auto", help="where to run (default: auto)")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all physical cores)")
    machine.add_argument("--max-visual-tokens", type=int, metavar="N", help="visual tokens that the cache holds")
    machine.add_argument("--max-text-tokens", type=int, metavar="N", help="text tokens that the cache holds")
    machine.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="feed longer prompts in pieces of N tokens (default: whole)"
    )
    machine.add_argument(
        "--cut-after-pictures",
        action="store_true",
        help="end a call of the prompt behind the pictures of each turn: what follows sees them by their codes",
    )
    machine.add_argument("--no-verify", action="store_true", help="do not compare the files with their SHA-256 first")


STDIN = "-"
"""In place of a path: what comes through a pipe."""


def load_pictures(paths: Sequence[str]) -> list[Image]:
    """The pictures of ``--image``, one of which may come from stdin. Raises InputError."""
    from vkvx.runtime.sessions.pictures import load_picture

    if paths.count(STDIN) > 1:
        raise InputError("stdin holds one picture; give --image - once, and paths for the others")
    return [
        load_picture(piped("--image").buffer, name="the picture from stdin") if path == STDIN else load_picture(path)
        for path in paths
    ]


def piped(option: str) -> TextIO:
    """Stdin, for an option. Raises InputError if a person sits there, who would wait for a question."""
    if sys.stdin.isatty():
        raise InputError(f"{option} - reads stdin, which is a terminal here; pipe a file into it, or give its path")
    return sys.stdin


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of generation that were given, checked: before the bundle is looked at."""
    from vkvx.runtime.sessions.sampling import GenerationOptions

    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    GenerationOptions(**given)
    return given


def options(args: argparse.Namespace, manifest: Manifest, given: dict[str, Any]) -> GenerationOptions:
    """What was given; everything else is as the checkpoint asks for, or plain."""
    from vkvx.runtime.sessions.sampling import changed_options, default_options

    defaults = None if args.no_checkpoint_defaults else default_options(manifest, given.get("max_new_tokens"))
    return changed_options(defaults, given)


def load_session(
    args: argparse.Namespace,
    visual_tokens: int | None = None,
    text_tokens: int | None = None,
    processor: Processor | None = None,
    slots: int = 1,
    reuse: bool = True,
) -> Session:
    """The bundle, ready to answer. The two sizes count where no option asks for others."""
    from vkvx.runtime.sessions.session import Session

    with terminal.ProgressBar(args.verb, announce=False) as progress:
        return Session.load(
            args.bundle,
            backend=args.backend,
            provider=args.provider,
            slots=slots,
            visual_tokens=visual_tokens if args.max_visual_tokens is None else args.max_visual_tokens,
            text_tokens=text_tokens if args.max_text_tokens is None else args.max_text_tokens,
            threads=args.threads,
            prefill_chunk=args.prefill_chunk,
            cut_after_pictures=args.cut_after_pictures,
            reuse=reuse,
            verify=not args.no_verify,
            progress=progress,
            processor=processor,
        )


def figures(session: Session, conversation: Conversation) -> dict[str, Any]:
    """Speed of the last answer, and what the conversation takes in the cache."""
    cache, slot = session.backend.cache, conversation.slot
    visual_tokens, visual_bytes = cache.visual_tokens(slot), cache.visual_bytes_used(slot)
    last = conversation.last
    answer: dict[str, Any] = {}
    if last is not None:
        answer = {
            "new_tokens": len(last.token_ids),
            "token_ids": list(last.token_ids),
            "finish_reason": last.finish_reason,
            "prompt_tokens": last.prompt_tokens,
            "prefill_seconds": last.prefill_seconds,
            "decode_seconds": last.decode_seconds,
            "tokens_per_second": last.tokens_per_second,
        }
    return {
        "backend": session.backend.name,
        "provider": session.backend.provider,
        "device": session.backend.device,
        "backend_reason": session.backend_reason,
        **answer,
        "visual_tokens": visual_tokens,
        "visual_bytes": visual_bytes,
        "bytes_per_visual_token": visual_bytes / visual_tokens if visual_tokens else None,
        "sixteen_bit_bytes_per_visual_token": session.manifest.layout.sixteen_bit_bytes_per_picture(1),
        "text_tokens": cache.text_tokens(slot),
        "text_bytes": cache.bytes_used(slot) - visual_bytes,
        "cache_bytes_used": cache.bytes_used(slot),
        "cache_bytes_allocated": cache.allocated_bytes,
    }


def figure_lines(found: dict[str, Any]) -> list[str]:
    """The figures for a person."""
    size = terminal.human_bytes
    lines = []
    if "new_tokens" in found:
        lines.append(
            f"{found['new_tokens']} tokens at {found['tokens_per_second']:.1f} tokens/s ({found['finish_reason']}),"
            f" {found['prompt_tokens']} tokens of prompt in {found['prefill_seconds']:.2f} s"
        )
    if "frames" in found:
        lines.append(f"{found['frames']} frames of video")
    if found["visual_tokens"]:
        plain = found["sixteen_bit_bytes_per_visual_token"]
        lines.append(
            f"{found['visual_tokens']} visual tokens in {size(found['visual_bytes'])}:"
            f" {found['bytes_per_visual_token']:,.0f} bytes each, {plain:,} in 16 bits"
        )
    lines.append(
        f"{found['text_tokens']} text tokens in {size(found['text_bytes'])};"
        f" cache in use {size(found['cache_bytes_used'])} of {size(found['cache_bytes_allocated'])}"
    )
    lines.append(f"ran in {found['backend']} on {found['device']}: {found['backend_reason']}")
    return lines
