"""Every family in torch on a GPU: captured steps are the eager ones, and choose what onnxruntime chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import PICTURES, PROMPTS, ROOM, Recorded

from vkvx.runtime.backends import golden
from vkvx.runtime.sessions.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]


def answers(session: Session) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
    """Tokens of both prompts, and the logits of each step."""
    recorded = Recorded(session)
    given = session.generate(list(PROMPTS), list(PICTURES), max_new_tokens=16, ignore_eos=True)
    return [one.token_ids for one in given], [np.stack(recorded.logits[row]) for row in range(len(given))]


def test_captured_steps(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vkvx.runtime.backends.torch.backend import TorchBackend

    monkeypatch.setattr(TorchBackend, "samples", False)  # logits come to the host, and are recorded
    with Session.load(packed, **ROOM, backend="onnxruntime", provider="cpu") as session:
        expected, wanted = answers(session)
    found: list[Any] = []
    for captured in (True, False):
        with Session.load(packed, **ROOM, backend="torch", provider="cuda") as session:
            backend: Any = session.backend
            assert backend.captures
            if not captured:
                backend._steps = None
            found.append(answers(session))
    tokens, logits = found[0]
    assert tokens == found[1][0]
    assert all(np.array_equal(a, b) for a, b in zip(logits, found[1][1], strict=True))
    assert tokens == expected
    prefill, later = golden.TOLERANCES["float32"]
    for row, (ours, theirs) in enumerate(zip(logits, wanted, strict=True)):
        off = golden.difference(ours, theirs)
        print(f"row {row}: logits off by {off.max():.2g} of their range")
        assert off[0] <= prefill
        assert off.max() <= later
