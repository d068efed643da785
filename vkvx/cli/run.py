"""``vkvx run``: one question, the answer as it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import generation, terminal
from vkvx.errors import InputError, OptionError
from vkvx.options import keyword

if TYPE_CHECKING:
    from vkvx.manifest import Manifest

PROMPT_TOKENS = 1024
"""Default capacity for the text of a prompt."""


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "run",
        help="ask one question",
        description="Ask one question, with or without pictures. The answer goes to stdout, figures go to stderr.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="the question; pictures and videos are put before it, or where it says <image> and <video>",
    )
    parser.add_argument("--prompt-file", metavar="PATH", help="a file that holds the question; - reads stdin")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="a picture, - from stdin; may be repeated"
    )
    parser.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="PATH",
        help="a video, or a folder of frames; may be repeated",
    )
    parser.add_argument(
        "--raw-prompt",
        action="store_true",
        help="take the prompt as it is, without the chat template; it then holds one <image> for each picture and one "
        "<video> for each video, and special tokens count in it",
    )
    generation.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print answer and figures as JSON when all is done")
    return parser


def run(args: argparse.Namespace) -> int:
    """Answer one question."""
    from vkvx.runtime.backends.registry import choose_backend
    from vkvx.runtime.bundles import load_manifest
    from vkvx.runtime.sessions.processor import Processor, user_message

    given = generation.given_options(args)
    _check_idle(args)
    prompt = _prompt(args)
    manifest = load_manifest(args.bundle)
    options = generation.options(args, manifest, given)
    choose_backend(args.backend, Path(args.bundle), manifest, args.provider, args.threads)  # tells if it cannot run
    pictures = generation.load_pictures(args.image)  # before the weights: a wrong path is told at once
    with terminal.ProgressBar("run", announce=False) as progress:
        if not args.no_verify:  # before anything of the bundle is used
            manifest.verify(args.bundle, progress)
    processor = Processor.of_bundle(Path(args.bundle), manifest)
    if args.video:
        processor.check_videos()
    if not args.raw_prompt:
        prompt = processor.format([user_message(prompt, len(pictures), len(args.video))])
    with terminal.ProgressBar("run", announce=False) as progress:
        prepared = processor.prepare(
            prompt, pictures, args.video, limits=options.limits, fps=options.fps, progress=progress
        )
    prompt_text = len(prepared.token_ids) - sum(prepared.picture_lengths)
    text_tokens = min(manifest.model.max_positions, max(PROMPT_TOKENS, prompt_text) + options.max_new_tokens)
    room = _visual_tokens(manifest, prepared.picture_lengths)
    with (
        generation.load_session(args, room, text_tokens, processor) as session,
        session.conversation() as conversation,
        terminal.ProgressBar("run", announce=False) as progress,
    ):
        chunks = conversation.stream(prepared, options=options, progress=progress)
        answer = ""
        try:
            for chunk in chunks:
                progress.close()  # before the answer, on the same terminal
                answer += chunk.text
                if not args.json:
                    print(terminal.printable(chunk.text), end="", flush=True)
        except BaseException:
            if answer and not args.json:
                print(flush=True)  # so that the error has a line of its own
            raise
        figures = generation.figures(session, conversation)
        if args.video:
            figures["frames"] = prepared.frames
    if args.json:
        terminal.print_json({"text": answer, **figures})
        return 0
    sys.stdout.write("\n")
    sys.stdout.flush()
    for line in generation.figure_lines(figures):
        terminal.note(line)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    """The question, from the command line or a file, without the end of the file's last line."""
    path = args.prompt_file
    if (args.prompt is None) == (path is None):
        given = "both PROMPT and --prompt-file" if path else "neither PROMPT nor --prompt-file"
        raise OptionError(f"{given}; give one of the two")
    if path is None:
        return str(args.prompt)
    if path == generation.STDIN and generation.STDIN in args.image:
        raise OptionError("--prompt-file - and --image - both read stdin; give a path in place of one")
    try:
        from_pipe = path == generation.STDIN
        data = generation.piped("--prompt-file").buffer.read() if from_pipe else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no file at {path}; give --prompt-file a file of text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    return text.removesuffix("\n").removesuffix("\r")


def _check_idle(args: argparse.Namespace) -> None:
    """Raise OptionError for options of pictures or videos without any."""
    if args.fps is not None and not args.video:
        raise OptionError("fps= (--fps) has no effect without a video; give --video as well, or leave it out")
    for name in ("min_pixels", "max_pixels"):
        if getattr(args, name) is not None and not args.image:
            raise OptionError(f"{keyword(name)} has no effect without a picture; give --image as well, or leave it out")


def _visual_tokens(manifest: Manifest, lengths: Sequence[int]) -> int:
    """Room for exactly these pictures, in whole groups."""
    size = manifest.quantization.group_size
    return sum(-(-length // size) * size for length in lengths)
