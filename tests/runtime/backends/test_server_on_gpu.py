"""The server over tokens that are chosen on a GPU: what requests get alone, from threads, in pieces and in parts.

Vision towers run in parts, too, each of a layer, while others decode.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from samples import Page
from test_captured_steps import PROMPT, opened

from vkvx.errors import RequestCancelledError
from vkvx.runtime.backends.torch import turns
from vkvx.runtime.backends.torch.backend import TorchBackend
from vkvx.runtime.serving.server import Server

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]

WAYS: list[dict[str, Any]] = [
    {"max_new_tokens": 30},
    {"max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 4, "logprobs": True},
    {"max_new_tokens": 25, "repetition_penalty": 1.3, "ignore_eos": True},
    {"max_new_tokens": 24, "min_new_tokens": 12, "begin_suppress_tokens": tuple(range(4, 60))},
    {"max_new_tokens": 12, "stop": ("1",)},
    {"max_new_tokens": 9, "suppress_tokens": tuple(range(20, 40))},
]


def test_each_request_gets_what_it_gets_alone(pages: list[Page], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with rules of their own, which change in the midst of an answer; the expected ones are the host's choice."""
    two = PROMPT.replace("<image>", "<image><image>")
    given = [
        (two if number % 3 == 2 else PROMPT, [pages[(number + i) % 4].path for i in range(1 + (number % 3 == 2))], way)
        for number, way in enumerate([*WAYS, *WAYS[::-1]])
    ]
    with opened(16, "float32", "") as (session, backend):  # no code may tip
        session.prefill_chunk = 640
        with monkeypatch.context() as patched:
            patched.setattr(TorchBackend, "samples", False)
            alone = [session.generate(prompt, images, **way) for prompt, images, way in given]
        assert backend.samples
        monkeypatch.setattr(turns, "PART", 1)  # towers stop behind each layer
        for captured in (False, True):
            if captured:
                backend.capture_prefills(640)
            with Server(session) as server, ThreadPoolExecutor(4) as pool:
                endless = server.submit(PROMPT, pages[0].path, max_new_tokens=200, ignore_eos=True)
                endless.chunk(0)
                pending = pool.map(lambda one: server.submit(one[0], one[1], **one[2]).result(), given)
                endless.cancel()
                answers = list(pending)
                with pytest.raises(RequestCancelledError):
                    endless.result()
            assert [(one.text, one.finish_reason) for one in answers] == [
                (one.text, one.finish_reason) for one in alone
            ]
            assert [one.logprobs is not None for one in answers] == ["logprobs" in way for _, _, way in given]
            assert len(backend.cache.free_slots) == 4
        assert backend._prefills is not None
        assert backend._prefills.graphs


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_tower_in_parts_gives_the_same_bits(dtype: str, pages: list[Page], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run between its parts; one that is given up leaves its memory to the next."""
    monkeypatch.setattr(turns, "PART", 1)
    with opened(dtype=dtype) as (session, backend):
        prompt = PROMPT.replace("<image>", "<image><image>")
        (call,) = session.processor.prepare(prompt, [pages[0].path, pages[1].path]).vision_calls
        whole = np.asarray(backend.encode(call))
        with session.conversation() as talk:
            talk.generate(PROMPT, pages[2].path, max_new_tokens=4, ignore_eos=True)
            parts, steps = backend.encode_in_parts(call), 0
            while True:
                try:
                    next(parts)
                except StopIteration as end:
                    embeds = end.value
                    break
                talk.generate("?", max_new_tokens=2, ignore_eos=True)
                steps += 1
        assert steps >= 3
        np.testing.assert_array_equal(np.asarray(embeds), whole)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        for _ in range(3):
            parts = backend.encode_in_parts(call)
            next(parts)
            assert torch.cuda.memory_allocated() > held
            parts.close()
            assert torch.cuda.memory_allocated() == held
