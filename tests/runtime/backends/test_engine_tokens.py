"""Tokens behind an engine, chosen on a GPU: those of NumPy from the same logits, with steps under way meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vkvx.runtime.backends.base import SampledRow
from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.sessions.generation import Request
from vkvx.runtime.sessions.processor import Prepared
from vkvx.runtime.sessions.sampling import GenerationOptions, Sampler
from vkvx.runtime.sessions.scheduler import run

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]
pytest.importorskip("cuda.bindings.runtime")

WAYS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 30},
    {"max_new_tokens": 1, "logprobs": True},
    {"max_new_tokens": 25, "temperature": 0.8, "top_p": 0.9, "seed": 4, "logprobs": True},
    {"max_new_tokens": 40, "temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3, "ignore_eos": True},
    {"max_new_tokens": 33, "temperature": 2.0, "min_new_tokens": 12, "begin_suppress_tokens": (5, 6, 7)},
    {"max_new_tokens": 17, "temperature": 3.0, "seed": 2**63, "ignore_eos": True},
    {"max_new_tokens": 21, "temperature": 1.0, "no_repeat_ngram_size": 2},
)


class Text:
    """In place of a processor: a letter a token."""

    placeholder_ids = (3,)

    @staticmethod
    def decode(token_ids: Sequence[int]) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)


def answers(backend: Any, count: int) -> list[Any]:
    """Requests of all ways, more than there are slots; their prompts are of 1 to 5 tokens."""
    requests = []
    for row in range(count):
        options = GenerationOptions(**WAYS[row % len(WAYS)])
        prepared = Prepared(np.arange(10 + row, 11 + row + row % 5, dtype=np.int32), (), ())
        requests.append(Request(row, prepared, options, Text(), backend))  # type: ignore[arg-type]
    found: list[Any] = [None] * count
    for chunk in run(backend, requests):
        if chunk.generation is not None:
            found[chunk.row] = chunk.generation
    return found


@pytest.mark.parametrize(("vocab", "slots"), [(406, 3), (32064, 6)])
def test_answers_are_those_of_numpy(tmp_path: Path, vocab: int, slots: int) -> None:
    """Rows join and leave; some steps have more rows than requests."""
    from bigram_engine import open_backend

    found = []
    for on_gpu in (True, False):
        backend, _ = open_backend(tmp_path / str(on_gpu), vocab, slots=slots)
        assert backend.samples
        if not on_gpu:
            backend.sampler = None
        given = answers(backend, 2 * len(WAYS))
        assert bool(backend.graphs) == on_gpu
        assert len(backend.cache.free_slots) == slots
        backend.close()
        found.append([(one.text, one.token_ids, one.finish_reason) for one in given])
        found.append(np.concatenate([one.logprobs for one in given if one.logprobs]))  # type: ignore[arg-type]
    assert found[0] == found[2]
    np.testing.assert_allclose(found[1], found[3], rtol=1e-5, atol=1e-5)
    assert {"eos", "length"} <= {reason for _, _, reason in found[0]}


def test_launches_do_not_wait_for_their_tokens(tmp_path: Path) -> None:
    """Seven steps are launched before the first token is read; each goes on from the one before."""
    from bigram_engine import open_backend

    backend, bigram = open_backend(tmp_path, 5000, slots=4)
    slots, steps = (2, 0, 3), 8
    options = [GenerationOptions(temperature=1.0, top_p=0.95, seed=seed) for seed in slots]
    rows = [[SampledRow(1.0, 0, 0.95, 1.0, seed, step, False) for seed in slots] for step in range(steps)]
    expected = []
    for one, slot in zip(options, slots, strict=True):
        sampler, token = Sampler(one, 5000, (3, 4)), slot + 7
        backend.begin(slot, (), (3, 4))
        for step in range(steps):
            token = sampler.choose(bigram.logits(token, step + 1)).token
            sampler.note(token)
            expected.append(token)
    pending = []
    for step in range(steps):
        fed = [Row(slot, np.array([slot + 7 if step == 0 else -1]), (), step) for slot in slots]
        call = build_call(fed, group_size=640, image_token_id=-5)
        pending.append(backend.launch(call, None, rows[step]))
    assert backend.cache.text_count.tolist() == [steps, 0, steps, steps]
    found = np.array([one.result()[0] for one in pending])
    assert found.T.ravel().tolist() == expected
    assert list(backend.graphs) == [4]
    backend.close()
