"""``vkvx chat``: several turns over one packed history."""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vkvx.cli import generation, remote, terminal
from vkvx.errors import CapacityError, InputError, OptionError, VkvxError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vkvx.manifest import Manifest
    from vkvx.runtime.sessions.processor import Processor
    from vkvx.runtime.sessions.sampling import GenerationOptions
    from vkvx.runtime.sessions.session import Session
    from vkvx.runtime.sessions.videos import Video

TEXT_TOKENS = 4096
"""Default capacity for text: several turns need more than one question."""

HELP = """\
/image PATH   add a picture to the next message
/video PATH   add a video file or a folder of frames to it
/drop         take back pictures and videos that wait for the next message
/reset        forget everything
/stats        tokens and bytes in the cache, speed of the last answer
/help         this text
/quit         leave (so does the end of the input)
PATH may be quoted, as terminals paste it; Tab completes paths and commands. Ctrl-C stops an answer, or clears the line;
Ctrl-D leaves. Anything else is a message."""
COMMANDS = ("/image", "/video", "/drop", "/reset", "/stats", "/help", "/quit")


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "chat",
        help="ask in several turns",
        description="Ask in several turns; earlier pictures and text stay in the packed cache. Reads a line a message"
        " from the terminal or from a pipe.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help="directory of a bundle; or give --url")
    parser.add_argument(
        "--url", metavar="URL", help="chat with a server of `vkvx serve`, such as http://127.0.0.1:8000"
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"the server's key (default: ${remote.KEY})")
    generation.add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Read lines until the end."""
    from vkvx.runtime.bundles import load_manifest

    given = generation.given_options(args)
    if (args.bundle is None) == (args.url is None):
        given_both = "neither BUNDLE nor --url" if args.url is None else "both BUNDLE and --url"
        raise OptionError(f"{given_both}; give one of the two")
    if args.url is not None:
        return _read(remote.connect(args, given))
    if args.api_key is not None:
        raise OptionError("--api-key is for a server; give --url as well, or leave it out")
    manifest = load_manifest(args.bundle)
    options = generation.options(args, manifest, given)
    processor = _open_processor(args, manifest, options)
    text_tokens = min(manifest.model.max_positions, TEXT_TOKENS)
    with generation.load_session(args, text_tokens=text_tokens, processor=processor) as session:
        return _read(Local(session, options))


def _read(partner: Partner) -> int:
    """Carry out lines until the end; the exit code."""
    is_script = not sys.stdin.isatty()
    chat = Chat(partner)
    terminal.note(f"{partner.name}; /help lists the commands")
    for line in _lines():
        if not chat.take(line.strip()):
            break
    return 2 if chat.refused and is_script else 0  # a person has read what was told


def _open_processor(args: argparse.Namespace, manifest: Manifest, options: GenerationOptions) -> Processor:
    """The bundle's processor. What would refuse each message is refused here, before weights are read."""
    from vkvx.runtime.backends.registry import choose_backend
    from vkvx.runtime.sessions.processor import Processor

    choose_backend(args.backend, Path(args.bundle), manifest, args.provider, args.threads)
    with terminal.ProgressBar("chat", announce=False) as progress:
        if not args.no_verify:  # before anything of the bundle is used
            manifest.verify(args.bundle, progress)
    processor = Processor.of_bundle(Path(args.bundle), manifest)
    if not processor.has_chat_template:
        raise InputError("this bundle has no chat template, which a chat needs; ask it by `vkvx run --raw-prompt`")
    processor.check_limits(options.limits)
    if options.fps is not None:
        processor.check_videos()
    return processor


class Partner(Protocol):
    """Who answers: a session here, or a server."""

    name: str

    def ask(self, text: str, pictures: list[Image], videos: list[Video]) -> Generator[str, None, None]:
        """Pieces of the answer to a message; errors of the message come at once."""

    def video(self, path: Path) -> str:
        """What is told of a video that can go with a message. Raises VkvxError for one that cannot."""

    def reset(self) -> None:
        """Forget everything."""

    def figures(self) -> list[str]:
        """Tokens, bytes and speed, for a person."""

    @property
    def has_answered(self) -> bool:
        """Whether there is something to forget."""


class Local:
    """A session's conversation."""

    def __init__(self, session: Session, options: GenerationOptions) -> None:
        self._session, self._options = session, options
        self._conversation = session.conversation()
        self.name = session.manifest.model.name

    def ask(self, text: str, pictures: list[Image], videos: list[Video]) -> Generator[str, None, None]:
        return self._conversation.ask(text, pictures, videos, options=self._options)

    def video(self, path: Path) -> str:
        from vkvx.runtime.sessions.videos import open_clip

        clip = open_clip(path, self._options.fps)
        return f"video of {clip.total} frames of {clip.width} x {clip.height} pixels"

    def reset(self) -> None:
        self._conversation.close()
        self._conversation = self._session.conversation()

    def figures(self) -> list[str]:
        return generation.figure_lines(generation.figures(self._session, self._conversation))

    @property
    def has_answered(self) -> bool:
        return self._conversation.last is not None


class Chat:
    """Carries out lines; keeps the pictures and videos that wait for the next message."""

    def __init__(self, partner: Partner) -> None:
        self._partner = partner
        self.refused = False
        """Whether anything that was asked for could not be done."""
        self._pictures: list[Image] = []
        self._videos: list[Video] = []

    def take(self, line: str) -> bool:
        """Carry out one line; False if the chat ends. What goes wrong in a turn is told and changes nothing."""
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return False
            if command == "/image":
                self._add_picture(_path(command, argument))
            elif command == "/video":
                self._add_video(_path(command, argument))
            elif command == "/drop":
                self._pictures, self._videos = [], []
            elif command == "/reset":
                self._reset()
            elif command == "/stats":
                print("\n".join(self._partner.figures()))
            elif command == "/help":
                print(HELP)
            elif command.startswith("/"):
                raise InputError(f"unknown command {command}; /help lists the commands")
            elif line:
                self._answer(line)
        except VkvxError as error:
            self.refused = True
            terminal.note(f"error: {error}")
        sys.stdout.flush()
        return True

    def _add_picture(self, path: Path) -> None:
        from vkvx.runtime.sessions.pictures import load_picture

        picture = load_picture(path)
        self._pictures.append(picture)
        terminal.note(f"picture of {picture.width} x {picture.height} pixels goes with the next message")

    def _add_video(self, video: Path) -> None:
        words = self._partner.video(video)
        self._videos.append(video)
        terminal.note(f"{words} goes with the next message")

    def _reset(self) -> None:
        self._partner.reset()
        self._pictures, self._videos = [], []
        terminal.note("everything is forgotten")

    def _answer(self, text: str) -> None:
        try:
            pieces = self._partner.ask(text, self._pictures, self._videos)
        except VkvxError as error:
            kept = "; what was to go with it waits for the next one, /drop takes it back"
            terminal.note(f"the message was not sent{kept if self._pictures or self._videos else ''}")
            if isinstance(error, CapacityError) and self._partner.has_answered:
                terminal.note("/reset makes room: it forgets what was said before")
            raise
        self._pictures, self._videos = [], []
        stopped = False
        with _interruption() as asked:
            for piece in pieces:
                print(terminal.printable(piece), end="", flush=True)
                if asked():
                    stopped = True
                    break
        pieces.close()
        print(" [stopped]" if stopped else "")


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C is only noted, so that it cannot come between a step and its bookkeeping; a second one counts."""
    noted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _path(command: str, text: str) -> Path:
    """A path as people type it, or as terminals paste it: quoted, or with blanks escaped. Raises InputError."""
    try:
        parts = shlex.split(text) if "'" in text or '"' in text or "\\" in text else [text.strip()]
    except ValueError as error:
        raise InputError(f"the path {text} is not understood ({error}); quote it as in a shell") from error
    if len(parts) != 1 or not parts[0]:
        raise InputError(f"{command} wants one path, such as `{command} page.png`; quote a path that has blanks in it")
    return Path(parts[0]).expanduser()


def completions(line: str) -> list[str]:
    """What a line can become: a command, and behind ``/image`` and ``/video`` a path."""
    command, blank, begun = line.partition(" ")
    if not blank:
        return [f"{known} " for known in COMMANDS if known.startswith(line)] if line.startswith("/") else []
    if command not in ("/image", "/video"):
        return []
    begun = begun.lstrip().replace("\\ ", " ")
    found = sorted(glob.glob(f"{glob.escape(os.path.expanduser(begun))}*"))
    words = [(f"{path}/" if os.path.isdir(path) else path).replace(" ", "\\ ") for path in found]
    return [f"{command} {word}" for word in words]


def _complete(text: str, state: int) -> str | None:
    import readline

    found = completions(readline.get_line_buffer())
    return found[state] if state < len(found) else None


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline

        readline.set_completer(_complete)
        readline.set_completer_delims("\n")
        readline.parse_and_bind("tab: complete")
    with _prompts() as read:
        told = False
        while True:
            try:
                line = read("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if not told:
                    terminal.note("Ctrl-D leaves")
                told = True
            else:
                yield line


@contextmanager
def _prompts() -> Iterator[Callable[[str], str]]:
    """Gives a way to read a line, which Ctrl-C ends. A moment before or after, Ctrl-C does nothing the first time."""
    reading = noted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal noted
        if reading or noted:
            raise KeyboardInterrupt
        noted = True

    def read(prompt: str) -> str:
        nonlocal reading, noted
        noted = False
        reading = True
        try:
            return input(prompt)
        finally:
            reading = False

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield read
    finally:
        signal.signal(signal.SIGINT, before)
