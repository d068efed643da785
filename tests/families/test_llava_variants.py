"""LLaVA in forty forms against ``generate()`` of transformers, token for token, and validated at 16 bits and packed.

Every run goes through a few that have each trait once, and packs the widest heads; ``VKVX_VARIANTS=all`` goes through
all, and packs each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from families import ROOM, TALL, WIDE
from reference import Reference
from variants import VARIANTS, Variant, write_variant

from vkvx import ExportOptions, export_model, validate_bundle
from vkvx.runtime.sessions.processor import PLACEHOLDER
from vkvx.runtime.sessions.session import Session

PROMPT = f"First {PLACEHOLDER} then{PLACEHOLDER}\nWhat differs?"
TOKENS = 32
OFTEN = [one for one in VARIANTS if one.often]
ALL = os.environ.get("VKVX_VARIANTS") == "all"
CHOSEN = VARIANTS if ALL else OFTEN
WIDE_HEADS = 256


@pytest.mark.parametrize("variant", CHOSEN, ids=lambda one: one.name)
def test_variant(variant: Variant, tmp_path: Path) -> None:
    checkpoint, exact, packed = (tmp_path / name for name in ("checkpoint", "exact", "packed"))
    write_variant(checkpoint, variant)
    reference = Reference(checkpoint)
    prompt = PROMPT.replace(PLACEHOLDER, reference.picture)
    expected, _ = reference.generate(reference.inputs([prompt], [[WIDE, TALL]]), TOKENS)
    assert len(set(expected[0].tolist())) > TOKENS / 5  # so that one token too many or too few would be noticed
    manifest = export_model(checkpoint, exact, ExportOptions(dtype="float32", bits=16))
    assert manifest.model.tokens_per_picture == variant.tokens
    with Session.load(exact, **ROOM, backend="onnxruntime") as session:
        answer = session.generate(PROMPT, [WIDE, TALL], max_new_tokens=TOKENS, ignore_eos=True)
    assert answer.token_ids == tuple(expected[0])
    bundles = [exact]
    if ALL or variant.heads[2] == WIDE_HEADS:
        export_model(checkpoint, packed, ExportOptions(quantizer=variant.quantizer))
        bundles.append(packed)
    for bundle in bundles:
        report = validate_bundle(bundle, provider="cpu", steps=4)
        assert [check for check in report.checks if not check.passed] == []


def test_the_often_run_have_each_trait_once() -> None:
    def traits(one: Variant) -> set[object]:
        query, single, dim = one.heads
        size, patch = one.pixels
        layers, strategy = one.features
        rope = one.text.get("rope_parameters", {}).get("rope_type", "default")
        found = {one.decoder, one.tower, strategy, f"rope {rope}", f"layers {isinstance(layers, list)}"}
        found |= {f"head dim {dim}"} if dim in (64, 96, 256) else set()
        found |= {"single KV head"} if single == 1 else {"grouped KV heads"} if single < query else set()
        found |= {f"odd {one.tower}"} if size % patch else set()
        found |= {"tied"} if one.text.get("tie_word_embeddings") else set()
        found |= {"padded"} if one.text.get("vocab_size", 512) > 512 else set()
        found |= {"no bias"} if one.more.get("multimodal_projector_bias") is False else set()
        return (
            found | ({"rules"} if one.generation else set()) | {f"{one.quantizer}"} - {"minmax", "quantile", "shrink"}
        )

    assert len(VARIANTS) == 40
    wanted = set().union(*map(traits, VARIANTS))
    assert wanted - set().union(*map(traits, OFTEN)) == set()
