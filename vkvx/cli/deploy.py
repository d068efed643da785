"""``vkvx deploy``: writes what a server needs to serve a bundle."""

from __future__ import annotations

import argparse
from typing import Any

from vkvx.cli import terminal
from vkvx.errors import OptionError


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "deploy",
        help="write a model repository for a server",
        description="Write what a server needs to serve a bundle.",
    )
    servers = parser.add_subparsers(dest="server", metavar="SERVER", required=True)
    triton = servers.add_parser(
        "triton",
        help="Triton Inference Server",
        description="Add a bundle to a model repository of Triton Inference Server, served by its Python backend.",
    )
    triton.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle, with its engines if there are any")
    triton.add_argument("-o", "--output", required=True, metavar="REPOSITORY", help="the model repository")
    triton.add_argument("--name", metavar="NAME", help="of the model (default: the bundle's)")
    triton.add_argument("--backend", default="auto", metavar="NAME", help="of vkvx, as in `vkvx run` (default: auto)")
    triton.add_argument("--slots", type=int, default=8, metavar="N", help="sequences an instance runs side by side (8)")
    triton.add_argument("--max-visual-tokens", type=int, metavar="N", help="capacity of a slot (default: as in Python)")
    triton.add_argument("--max-text-tokens", type=int, metavar="N", help="capacity of a slot (default: as in Python)")
    triton.add_argument("--prefill-chunk", type=int, metavar="N", help="feed longer prompts in pieces of N tokens")
    triton.add_argument(
        "--cut-after-pictures", action="store_true", help="end a call of the prompt behind the pictures of each turn"
    )
    triton.add_argument("--no-reuse", action="store_true", help="feed each prompt whole, whatever slots hold of it")
    triton.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait for an instance (256)")
    triton.add_argument("--deadline", type=float, metavar="S", help="seconds after which an answer has to end (none)")
    triton.add_argument("--threads", type=int, metavar="N", help="CPU threads of an instance, which then is on the CPU")
    triton.add_argument("--gpus", metavar="LIST", help="such as 0,1; none: the CPU (default: what Triton finds)")
    triton.add_argument("--instances", type=int, default=1, metavar="N", help="on each GPU (default: 1)")
    triton.add_argument(
        "--reference", metavar="PATH", help="where the server finds the bundle; nothing is copied into the repository"
    )
    triton.add_argument(
        "--environment",
        metavar="PATH",
        help="where the server finds the Python environment to run it in: a directory, or an archive of conda-pack",
    )
    triton.add_argument("--force", action="store_true", help="replace a model that vkvx has written there")
    triton.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the repository, then say how to start the server."""
    from vkvx.runtime.serving.deploy import write_triton_repository

    with terminal.ProgressBar("deploy", announce=False) as progress:
        model = write_triton_repository(
            args.bundle,
            args.output,
            name=args.name,
            backend=args.backend,
            reference=args.reference,
            slots=args.slots,
            visual_tokens=args.max_visual_tokens,
            text_tokens=args.max_text_tokens,
            prefill_chunk=args.prefill_chunk,
            cut_after_pictures=args.cut_after_pictures,
            reuse=not args.no_reuse,
            max_waiting=args.max_waiting,
            deadline=args.deadline,
            threads=args.threads,
            environment=args.environment,
            gpus=_gpus(args.gpus),
            instances=args.instances,
            force=args.force,
            progress=progress,
        )
    if args.json:
        terminal.print_json({"model": model.name, "directory": str(model)})
    else:
        print(f"model         {model}")
        print(f"next          tritonserver --model-repository {model.parent}")
    return 0


def _gpus(text: str | None) -> list[int] | None:
    if text is None or text == "none":
        return None if text is None else []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--gpus {text} is not understood: give a list such as 0,1, or none") from None
