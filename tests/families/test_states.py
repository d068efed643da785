"""Families with linear attention: states belong to slots, and are what onnxruntime and torch make of a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from families import CASES, PICTURES, PROMPTS, ROOM, TALL, WIDE

from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.sessions.session import Session

ATOL = 1e-4
"""Of logits in FP32, whose range is about 10."""
pytestmark = pytest.mark.parametrize(
    "case", [case for case in CASES if case.preset == "tiny-qwen3.5"], indirect=True, ids=lambda case: case.preset
)


@pytest.fixture(scope="module")
def session(exact: Path) -> Any:
    with Session.load(exact, **ROOM, backend="onnxruntime") as opened:
        yield opened


def test_states_belong_to_slots(session: Session, exact: Path) -> None:
    """Linear attention: what slots held before, idle rows and cuts of a prompt do not count, and a fork has its own."""
    info, backend = session.manifest.model, session.backend
    graph = onnx.load(exact / "decoder.onnx", load_external_data=False).graph
    for state in (entry.name for entry in graph.input if entry.name.endswith("_state")):
        # Read once, as a whole, before it is written: the two may share their memory.
        assert sorted(node.op_type for node in graph.node if state in node.input) == ["Gather", "ScatterND"]
    ids = np.arange(10, 100, dtype=np.int32)
    cache = backend.cache

    def feed(*rows: tuple[int, np.ndarray]) -> np.ndarray:
        given = [cache.row(slot, tokens) if slot >= 0 else Row(-1, tokens) for slot, tokens in rows]
        call = build_call(given, group_size=cache.group_size, image_token_id=info.image_token_id)
        return backend.step(call, None)

    first, second = cache.acquire(), cache.acquire()
    try:
        expected = feed((second, ids))[0]
        for slot in (first, second):
            cache.reset(slot)
            for buffer in cache.buffers.values():
                buffer[slot] = np.nan if buffer.dtype.kind == "f" else -1
        feed((first, ids[:7]), (second, ids[:70]))
        feed((-1, ids[:0]), (second, ids[70:89]))
        np.testing.assert_allclose(feed((second, ids[89:]))[0], expected, rtol=0, atol=ATOL)
        cache.fork(second, first)
        same = feed((first, ids[:1]), (second, ids[:1]))
        np.testing.assert_allclose(same[0], same[1], rtol=0, atol=ATOL)
        feed((first, ids[:20]))
        after = feed((second, ids[1:2]))[0]
        cache.reset(first)
        whole = np.concatenate([ids, ids[:2]])
        np.testing.assert_allclose(after, feed((first, whole))[0], rtol=0, atol=ATOL)
    finally:
        cache.release(first)
        cache.release(second)


def test_torch_updates_states_in_place(session: Session, exact: Path) -> None:
    """The same answers of a batch, and of a conversation and its fork, as onnxruntime gives."""

    def answers(opened: Session) -> list[tuple[int, ...]]:
        options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
        given = [answer.token_ids for answer in opened.generate(list(PROMPTS), list(PICTURES), **options)]
        with opened.conversation() as conversation:
            given.append(conversation.generate(PROMPTS[1], TALL, **options).token_ids)
            with conversation.fork() as twin:
                given.append(twin.generate("And?", **options).token_ids)
            given.append(conversation.generate(PROMPTS[0], [WIDE, TALL], **options).token_ids)
        return given

    with Session.load(exact, **ROOM, backend="torch", provider="cpu") as other:
        for buffer in other.backend.cache.buffers.values():
            buffer[...] = np.nan if buffer.dtype.kind == "f" else -1
        assert answers(other) == answers(session)
