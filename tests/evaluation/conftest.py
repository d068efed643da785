"""Two questions about bundled pages, of one and of two pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from samples import bundled_pages


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON Lines file; not to be changed."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    one, two, *_ = bundled_pages()
    lines = [
        {"image": str(one.path), "prompt": "Read row 2.", "answers": [one.truth.split("\n")[1]]},
        {"images": [str(two.path), str(one.path)], "prompt": "Transcribe the second page.", "answers": [one.truth]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
