"""The command ``vkvx``: one module per verb, each with ``add_parser`` and ``run``.

A verb imports what it needs when it runs, so that ``vkvx --help`` loads nothing heavy.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vkvx import __version__, packages, storage
from vkvx.cli import (
    bench,
    build,
    calibrate,
    chat,
    check,
    deploy,
    doctor,
    eval,
    export,
    inspect,
    models,
    plan,
    plugin,
    run,
    serve,
    terminal,
    validate,
)
from vkvx.errors import OptionError, StorageError, VkvxError
from vkvx.models.tiny_llava import CHECKPOINT

EXIT_OK, EXIT_FAILED, EXIT_ERROR, EXIT_BUG, EXIT_INTERRUPT, EXIT_PIPE = 0, 1, 2, 70, 130, 141
"""Done; a check failed; the user can fix it; a defect of vkvx; Ctrl-C; the reader of our output went away."""

VERBS = (
    models,
    check,
    calibrate,
    export,
    build,
    run,
    chat,
    serve,
    validate,
    bench,
    eval,
    inspect,
    plan,
    plugin,
    deploy,
    doctor,
)


class Parser(argparse.ArgumentParser):
    """Refuses abbreviated options, and reports a wrong command line as a VkvxError: one line, like all others."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="vkvx",
        description="Export multimodal LLMs to ONNX with a visual KV cache of 1, 2, 4 or 8 bits, and run them.",
        epilog=_example(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vkvx {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the log of the libraries")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in VERBS:
        added = module.add_parser(verbs)
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        added.set_defaults(execute=module.run)
    return parser


def _example() -> str:
    """Commands that work as they stand, wherever the package is installed."""
    page = CHECKPOINT / "pages" / "page_0.png"
    here = Path.cwd()
    path = shlex.quote(str(page.relative_to(here) if page.is_relative_to(here) else page))
    export = "vkvx export tiny-llava --bits 1 -o tiny"
    return f"example:\n  {export}\n  vkvx run tiny 'Transcribe the page.' --image {path}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing is raised but with ``--debug``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug, as_json = "--debug" in flags, "--json" in flags
    try:
        args = build_parser().parse_args(arguments)
        args.arguments = arguments
        terminal.quieten(debug)
        code = args.execute(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # --help, --version
        return stop.code if isinstance(stop.code, int) else EXIT_OK
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPT, "KeyboardInterrupt", as_json)
    except BrokenPipeError:
        _drop_stdout()
        return EXIT_PIPE
    except Exception as error:
        if debug:
            raise
        return _fail(*explain(error), type(error).__name__, as_json)


def explain(error: BaseException) -> tuple[str, int]:
    """The one line that tells a user what is wrong, and the exit code."""
    if isinstance(error, VkvxError):
        return str(error), EXIT_ERROR
    if isinstance(error, ImportError):
        if error.name:
            return str(packages.missing(error.name, error)), EXIT_ERROR
        return f"a Python package cannot be imported: {error}; see `vkvx doctor`", EXIT_ERROR
    if isinstance(error, OSError):
        storage = terminal.storage_error(error)
        if isinstance(storage, StorageError) or error.filename is not None:
            return str(storage), EXIT_ERROR
    if isinstance(error, MemoryError):
        return "not enough memory; try a smaller model, or fewer tokens with --max-visual-tokens", EXIT_ERROR
    return f"unexpected {type(error).__name__}: {error}; please report it with the output of --debug", EXIT_BUG


def _fail(message: str, code: int, kind: str, as_json: bool) -> int:
    """Tell what went wrong: in a line on stderr, and to who asked for JSON in an object on stdout as well."""
    line = " ".join(message.split())
    try:
        if as_json:
            terminal.print_json({"error": {"type": kind, "message": line, "exit_code": code}})
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
    print(f"vkvx: error: {line}", file=sys.stderr)
    return code


def _drop_stdout() -> None:
    """What is still buffered cannot be written: give the interpreter a place to flush it to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def entry() -> NoReturn:
    """Console script."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever has started this
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what an encoding lacks shall not end a command
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # Not if it is to be ignored, as under nohup.
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)
    sys.exit(main())


class _Interrupted(KeyboardInterrupt):
    """Where KeyboardInterrupt itself has left an exec() of text, Python ends by SIGINT, though it was caught later."""


def _stop(number: int, frame: object) -> NoReturn:
    """End with nothing half-written.

    While an export or a build runs, torch is at work: it may catch an exception that comes from here, and go on, or
    abort the process. So what is half-written goes at once, and the process with it.
    """
    if storage.discard_unfinished():
        os.write(2, b"\nvkvx: error: interrupted\n" if sys.stderr.isatty() else b"vkvx: error: interrupted\n")
        os._exit(EXIT_INTERRUPT)
    raise _Interrupted
