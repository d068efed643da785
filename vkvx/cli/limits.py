"""Options for the limits of a picture's pixels, which several verbs share."""

from __future__ import annotations

from typing import Any


def add_pixel_limits(parser: Any) -> None:
    """``--min-pixels`` and ``--max-pixels`` for a parser or a group of one."""
    for name, what in (("--min-pixels", "least"), ("--max-pixels", "most")):
        parser.add_argument(
            name,
            type=int,
            metavar="N",
            help=f"{what} pixels of a picture once it is resized, for models that limit them (default: the model's)",
        )
