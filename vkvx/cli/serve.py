"""``vkvx serve``: a bundle behind an HTTP server with OpenAI's interface."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx import packages
from vkvx.cli import generation, remote, terminal
from vkvx.errors import OptionError

if TYPE_CHECKING:
    from vkvx.runtime.sessions.session import Session

TEXT_TOKENS = 4096
"""Default capacity for the text of a conversation, which comes whole with each request."""


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "serve",
        help="serve a bundle over HTTP",
        description="Serve a bundle over HTTP, with OpenAI's interface under /v1 and a page to try it at /.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default: 8000)")
    parser.add_argument("--name", metavar="NAME", help="of the model, which requests give (default: the bundle's)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what clients have to know (default: ${remote.KEY}; else none)"
    )
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds for answers to end (30)")

    limits = parser.add_argument_group("requests")
    limits.add_argument("--max-waiting", type=int, default=256, metavar="N", help="requests that may wait (256)")
    limits.add_argument("--deadline", type=float, metavar="S", help="seconds after which an answer has to end (none)")
    limits.add_argument("--max-body", default="64MiB", metavar="SIZE", help="of a request, pictures included (64MiB)")
    limits.add_argument("--allow-local-files", metavar="DIR", help="let requests name pictures below DIR by file: URLs")
    limits.add_argument(
        "--allow-hosts", nargs="+", default=[], metavar="HOST", help="let requests name pictures on these public hosts"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--slots", type=int, default=8, metavar="N", help="requests that run side by side (8)")
    machine.add_argument("--no-reuse", action="store_true", help="feed each prompt whole, whatever slots hold of it")
    generation.add_machine_options(machine)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    packages.require("serve", *packages.SERVE)
    from vkvx.runtime.bundles import load_manifest
    from vkvx.runtime.serving.http.app import Settings
    from vkvx.runtime.serving.http.pictures import PictureSources
    from vkvx.runtime.serving.http.run import serve

    manifest = load_manifest(args.bundle)  # before anything is opened to others
    key = args.api_key if args.api_key is not None else os.environ.get(remote.KEY)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise OptionError("--api-key must be visible ASCII characters")
    if args.name is not None and not args.name.strip():
        raise OptionError("--name is empty; give the name that requests are to name, or leave it out")
    if args.max_waiting < 1:
        raise OptionError(f"--max-waiting must be at least 1, got {args.max_waiting}")
    if args.deadline is not None and not 0 < args.deadline < float("inf"):
        raise OptionError(f"--deadline must be more than 0 seconds, got {args.deadline:g}")
    directory = None if args.allow_local_files is None else Path(args.allow_local_files)
    max_body = terminal.parse_bytes(args.max_body, "--max-body")
    settings = Settings(
        name=args.name,
        api_key=key,
        pictures=PictureSources(directory, tuple(args.allow_hosts), max_body),
        max_body=max_body,
        max_waiting=args.max_waiting,
        deadline=args.deadline,
    )

    def listening(address: str) -> None:
        terminal.note(f"listens at {address}, loads {args.bundle}; Ctrl-C stops")
        if key is None and args.host not in ("127.0.0.1", "::1", "localhost"):
            terminal.note("warning: whoever reaches this address may use it; give --api-key")

    def ready(session: Session) -> None:
        where = f"{session.backend.name} on {session.backend.device}: {session.backend_reason}"
        terminal.note(f"{args.name or session.manifest.model.name} is ready in {where}")

    serve(
        lambda: generation.load_session(
            args,
            slots=args.slots,
            text_tokens=min(manifest.model.max_positions, TEXT_TOKENS),
            reuse=not args.no_reuse,
        ),
        settings,
        host=args.host,
        port=args.port,
        grace=args.grace,
        listening=listening,
        ready=ready,
    )
    return 0
