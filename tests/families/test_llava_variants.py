"""LLaVA in forty forms against ``generate()`` of transformers, token for token, and validated at 16 bits and packed.

Every run goes through a few that have each trait once; ``VKVX_VARIANTS=all`` goes through all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from families import ROOM, TALL, WIDE
from reference import Reference
from variants import VARIANTS, Variant

from vkvx import ExportOptions, export_model, validate_bundle
from vkvx.models.random_checkpoint import write_checkpoint
from vkvx.runtime.sessions.processor import PLACEHOLDER
from vkvx.runtime.sessions.session import Session

PROMPT = f"First {PLACEHOLDER} then{PLACEHOLDER}\nWhat differs?"
TOKENS = 32
CHOSEN = [one for one in VARIANTS if one.often or os.environ.get("VKVX_VARIANTS") == "all"]

TRAITS: dict[str, Callable[[Variant], Iterable[Any]]] = {
    "decoder": lambda one: [one.decoder],
    "KV heads": lambda one: [(one.heads[1] == 1, one.heads[1] == one.heads[0])],
}


@pytest.mark.parametrize("variant", CHOSEN, ids=lambda one: one.name)
def test_variant(variant: Variant, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint, variant.config(), dtype="float32", seed=1)
    reference = Reference(checkpoint)
    prompt = PROMPT.replace(PLACEHOLDER, reference.picture)
    expected, _ = reference.generate(reference.inputs([prompt], [[WIDE, TALL]]), TOKENS)
    manifest = export_model(checkpoint, tmp_path / "exact", ExportOptions(dtype="float32", bits=16))
    assert manifest.model.tokens_per_picture == variant.tokens
    with Session.load(tmp_path / "exact", **ROOM, backend="onnxruntime") as session:
        answer = session.generate(PROMPT, [WIDE, TALL], max_new_tokens=TOKENS, ignore_eos=True)
    assert answer.token_ids == tuple(expected[0])
    print(variant.name, len(set(answer.token_ids)))
    packed = tmp_path / "packed"
    export_model(checkpoint, packed, ExportOptions(quantizer=variant.quantizer))
    for bundle in (tmp_path / "exact", packed):
        report = validate_bundle(bundle, provider="cpu", steps=4)
        assert [check for check in report.checks if not check.passed] == []
