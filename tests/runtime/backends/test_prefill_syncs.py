"""Prompts in torch on a GPU: the host waits for nothing between pictures and the choice of the first token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import Page
from test_captured_steps import PROMPT, opened

from vkvx.runtime.backends.torch.backend import TorchBackend
from vkvx.runtime.sessions.pieces import cut

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]


def test_prompts_wait_for_nothing(pages: list[Page], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures, their places, tables of tokens, the call itself, whole and in pieces; torch raises where one waits."""
    calls = list[tuple[str, int]]()

    def strict(name: str) -> Callable[..., Any]:
        method = getattr(TorchBackend, name)

        def wrapped(self: TorchBackend, *given: Any) -> Any:
            is_step = name == "launch" and given[0].input_ids.shape[1] == 1
            calls.append((name, 1 if is_step else 0))
            torch.cuda.set_sync_debug_mode("default" if is_step else "error")  # the first step is captured
            try:
                return method(self, *given)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return wrapped

    images = [page.path for page in pages[:3]]
    prompt = PROMPT.replace("<image>", "<image><image>")
    with opened() as (session, backend):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchroniz"):  # so it does raise
                backend.cache.read("0.text_key")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = session.generate([prompt, "USER: Hi."], [images[:2], None], max_new_tokens=4, repetition_penalty=1.1)
        for name in ("encode", "place", "begin", "exclude", "launch"):
            monkeypatch.setattr(TorchBackend, name, strict(name))
        found = session.generate([prompt, "USER: Hi."], [images[:2], None], max_new_tokens=4, repetition_penalty=1.1)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        session.generate("USER: Hi.", begin_suppress_tokens=(5,), max_new_tokens=3)
        session.prefill_chunk = 640
        session.generate(prompt, images[:2], max_new_tokens=2)
        prepared = session.processor.prepare(prompt, images[:2])
        pieces = len(cut(prepared.token_ids, prepared.picture_lengths, session.manifest, 640))
    assert pieces > 1
    assert calls.count(("launch", 0)) == 1 + 1 + pieces
    assert {name for name, _ in calls} == {"encode", "place", "begin", "exclude", "launch"}
