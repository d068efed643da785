"""What a checkpoint's generation_config.json asks for, from the export to an answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vkvx.manifest import Manifest
from vkvx.runtime.sessions.session import GenerationOptions, Session
from vkvx.sampling import GenerationInfo

PROMPT = "How are you?"


@pytest.fixture
def asking(baseline_bundle: Path, own_copy: Callable[[Path], Path]) -> Callable[..., Path]:
    """A bundle whose checkpoint asks for these rules."""
    bundle = own_copy(baseline_bundle)

    def make(**rules: Any) -> Path:
        replace(Manifest.load(bundle), generation=GenerationInfo(**rules)).save(bundle)
        return bundle

    return make


def test_python_follows_them_unless_told_otherwise(asking: Callable[..., Path]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}
    bundle = asking()
    with Session.load(bundle, verify=False) as session:
        plain = session.generate(PROMPT, **options).token_ids
    bundle = asking(suppress_tokens=(plain[0],), repetition_penalty=1.5)
    with Session.load(bundle, verify=False) as session:
        followed = session.generate(PROMPT, **options).token_ids
        assert plain[0] not in followed
        same = session.generate(PROMPT, suppress_tokens=[plain[0]], repetition_penalty=1.5, **options).token_ids
        assert followed == same
        assert session.generate(PROMPT, suppress_tokens=[], repetition_penalty=1, **options).token_ids == plain
        assert session.generate(PROMPT, options=GenerationOptions(**options)).token_ids == plain
        with session.conversation() as conversation:
            assert conversation.generate(PROMPT, **options).token_ids == followed


def test_run_follows_them_unless_told_otherwise(cli: Callable, asking: Callable[..., Path]) -> None:
    def answer(*more: object) -> str:
        result = cli("run", asked, PROMPT, "--raw-prompt", "--max-new-tokens", 8, "--json", *more)
        assert result.code == 0, result.err
        return str(json.loads(result.out)["text"])

    asked = asking()
    plain = answer()
    asked = asking(temperature=3.0, stop=("never",))
    sampled = answer()
    assert sampled != plain
    assert answer("--seed", 1) != sampled
    assert answer("--temperature", 0) == answer("--no-checkpoint-defaults") == plain


def test_inspect_shows_them(cli: Callable, asking: Callable[..., Path]) -> None:
    assert "by the checkpoint's defaults: the likeliest token" in cli("inspect", asking()).out
    assert "defaults: suppress_tokens of 9 entries" in cli("inspect", asking(suppress_tokens=tuple(range(9)))).out
    bundle = asking(temperature=0.7, top_k=20, bad_words_ids=((5, 6),), ignored=("num_beams", "min_p"))
    shown = cli("inspect", bundle).out
    assert "by the checkpoint's defaults: temperature 0.7, top_k 20, bad_words_ids [[5, 6]]" in shown
    assert "left out of what it asks for: num_beams, min_p" in shown
    assert json.loads(cli("inspect", bundle, "--json").out)["generation"] == {
        "temperature": 0.7,
        "top_k": 20,
        "bad_words_ids": [[5, 6]],
        "ignored": ["num_beams", "min_p"],
    }


def test_export_tells_warnings(
    cli: Callable, asking: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = asking()

    def export(*_: object) -> Manifest:
        logging.getLogger("vkvx.export").warning("%s is left out", "num_beams")
        return Manifest.load(bundle)

    monkeypatch.setattr("vkvx.export.bundle.export_model", export)
    result = cli("export", "tiny-llava", "-o", tmp_path / "out")
    assert result.err.splitlines()[-1] == "warning: num_beams is left out"
    assert json.loads(cli("export", "tiny-llava", "-o", tmp_path / "out", "--json").out)["warnings"] == [
        "num_beams is left out"
    ]
