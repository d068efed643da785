"""The checkpoint and the pages that come with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vkvx.models import tiny_llava

CHECKPOINT = Path(tiny_llava.__file__).parent


@dataclass(frozen=True)
class Page:
    """A bundled page: its picture, and the digits on it, a line a row. None of its handwriting was trained on."""

    path: Path
    truth: str


def bundled_pages() -> list[Page]:
    """All bundled pages."""
    entries = json.loads((CHECKPOINT / "pages" / "pages.json").read_text(encoding="utf-8"))
    return [
        Page(CHECKPOINT / "pages" / entry["file"], "\n".join("".join(map(str, row)) for row in entry["digits"]))
        for entry in entries
    ]
