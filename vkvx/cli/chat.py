"""``vkvx chat``: several turns over one packed history."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import generation, terminal
from vkvx.errors import VkvxError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vkvx.runtime.sessions.sampling import GenerationOptions
    from vkvx.runtime.sessions.session import Session
    from vkvx.runtime.sessions.videos import Video

TEXT_TOKENS = 4096
"""Default capacity for text: several turns need more than one question."""

HELP = """\
/image PATH   add a picture to the next message
/video PATH   add a video file or a folder of frames to it
/reset        forget everything
/stats        tokens and bytes in the cache, speed of the last answer
/help         this text
/quit         leave (so does the end of the input)
Ctrl-C stops an answer. Anything else is a message."""


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
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle")
    generation.add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Read lines until the end."""
    from vkvx.manifest import Manifest

    options = generation.options(args)
    positions = Manifest.load(args.bundle).model.max_positions
    with generation.load_session(args, text_tokens=min(positions, TEXT_TOKENS)) as session:
        chat = Chat(session, options)
        terminal.note(f"{session.manifest.model.name}; /help lists the commands")
        for line in _lines():
            if not chat.take(line.strip()):
                break
    return 0


class Chat:
    """A conversation, and the pictures and videos that wait for the next message."""

    def __init__(self, session: Session, options: GenerationOptions) -> None:
        self._session = session
        self._options = options
        self._conversation = session.conversation()
        self._pictures: list[Image] = []
        self._videos: list[Video] = []

    def take(self, line: str) -> bool:
        """Carry out one line; False if the chat ends. What goes wrong in a turn is told and changes nothing."""
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return False
            if command == "/image":
                self._add_picture(argument.strip())
            elif command == "/video":
                self._add_video(argument.strip())
            elif command == "/reset":
                self._reset()
            elif command == "/stats":
                print("\n".join(generation.figure_lines(generation.figures(self._session, self._conversation))))
            elif command == "/help":
                print(HELP)
            elif command.startswith("/"):
                terminal.note(f"unknown command {command}; /help lists the commands")
            elif line:
                self._answer(line)
        except VkvxError as error:
            terminal.note(f"error: {error}")
        sys.stdout.flush()
        return True

    def _add_picture(self, path: str) -> None:
        from vkvx.runtime.sessions.pictures import load_picture

        picture = load_picture(Path(path).expanduser())
        self._pictures.append(picture)
        terminal.note(f"picture of {picture.width} x {picture.height} pixels goes with the next message")

    def _add_video(self, path: str) -> None:
        from vkvx.runtime.sessions.videos import open_clip

        video = Path(path).expanduser()
        clip = open_clip(video, self._options.fps)
        self._videos.append(video)
        terminal.note(f"video of {clip.total} frames of {clip.width} x {clip.height} pixels goes with the next message")

    def _reset(self) -> None:
        self._conversation.close()
        self._conversation, self._pictures, self._videos = self._session.conversation(), [], []
        terminal.note("everything is forgotten")

    def _answer(self, text: str) -> None:
        pictures, self._pictures = self._pictures, []
        videos, self._videos = self._videos, []
        try:
            pieces = self._conversation.ask(text, pictures, videos, options=self._options)
        except VkvxError:
            if pictures or videos:
                terminal.note(f"the message was not sent; its {'pictures' if pictures else 'videos'} are dropped")
            raise
        stopped = False
        with _interruption() as asked:
            for piece in generation.without_leading_space(pieces):
                print(piece, end="", flush=True)
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


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
