"""Tokens behind engines, on stand-ins for GPU, TensorRT and libvkvx: order of the work, and where the host chooses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import Cuda, TensorRT, make_engines

from vkvx.errors import DependencyError
from vkvx.manifest import Manifest
from vkvx.plugins.library import MAX_VOCAB, KernelLibrary
from vkvx.runtime.backends.base import SampledRow
from vkvx.runtime.backends.registry import open_backend
from vkvx.runtime.backends.tensorrt import sampling
from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.engines.manifest import Limits, PluginInfo
from vkvx.runtime.sessions.session import Session

LIMITS = Limits(batch_size=3, slots=4, input_len=1400, visual_tokens=640, text_tokens=200, pictures=1)
WAYS: list[dict[str, Any]] = [
    {"max_new_tokens": 5, "logprobs": True},
    {"max_new_tokens": 9, "temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3, "ignore_eos": True},
    {"max_new_tokens": 7, "temperature": 2.0, "top_p": 0.9, "seed": 4, "min_new_tokens": 4, "logprobs": True},
    {"max_new_tokens": 3, "temperature": 1.0, "begin_suppress_tokens": (19, 24)},
]


@pytest.fixture
def bundle(own_bundle: Path, tensorrt: TensorRT) -> Path:
    make_engines(own_bundle, LIMITS)
    return own_bundle


def opened(bundle: Path, **capacity: int) -> Any:
    manifest = Manifest.load(bundle)
    capacity = {"slots": 4, "visual_tokens": 640, "text_tokens": 64, **capacity}
    return open_backend("tensorrt", bundle, manifest, verify=False, **capacity)


def answers(bundle: Path) -> tuple[list[Any], set[int]]:
    """Tokens, log-probabilities and texts, and the numbers of rows of captured steps that chose tokens."""
    with Session.load(bundle, backend="tensorrt", verify=False, slots=3, text_tokens=160) as session:
        backend: Any = session.backend
        options = [session.options(None, way) for way in WAYS]
        found = session.generate(["USER: 2 plus 3? ASSISTANT:"] * len(WAYS), options=options)
        with session.conversation() as talk:
            said = ["".join(talk.ask(text, max_new_tokens=6, stop=("4",))) for text in ("2 plus 3?", "And 4 plus 4?")]
            return [*((one.token_ids, one.logprobs) for one in found), said, talk.token_ids], set(backend.graphs)


def test_the_same_tokens_as_on_the_host(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that join, leave and are penalised, with steps under way that nobody has waited for."""
    on_device, graphs = answers(bundle)
    assert graphs >= {1, 3}
    monkeypatch.setattr("vkvx.runtime.backends.tensorrt.backend.open_sampler", lambda *_: None)
    on_host, graphs = answers(bundle)
    assert not graphs
    assert on_device == on_host


def test_a_launch_waits_for_nothing(bundle: Path, cuda: Cuda) -> None:
    """Three steps are under way before anything is waited for; tokens are those of steps that are fed what was read."""
    backend = opened(bundle)
    tokens = []
    for ahead in (False, True):
        slot = int(ahead)
        backend.begin(slot, (), (2,))
        pending, last = [], 9
        for step in range(8):
            row = Row(slot, np.array([last], np.int32), (), step)
            waits, ran, blocks = cuda.synchronized, cuda.done, len(cuda.starts)
            call = build_call([row], group_size=640, image_token_id=3)
            pending.append(backend.launch(call, None, [SampledRow(5.0, 0, 1.0, 1.0, 7, step, True)]))
            if ahead and step < 3:
                assert (cuda.synchronized, cuda.done) == (waits, ran)
            assert len(cuda.starts) == blocks or step == 0
            last = -1 if ahead else int(pending[-1].result()[0][0])
        assert backend.cache.text_count[slot] == 8
        found = [one.result() for one in pending]
        tokens.append([(int(token[0]), float(probability[0])) for token, probability in found])
    assert tokens[0] == tokens[1]
    assert len({token for token, _ in tokens[0]}) > 2
    backend.close()


def test_the_host_chooses_where_nothing_else_can(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: Any) -> KernelLibrary:
        raise DependencyError("no libvkvx for this test")

    monkeypatch.setattr(sampling, "open_kernels", missing)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            backend = opened(bundle)
            assert not backend.samples
    assert [record.message for record in caplog.records] == [
        "tokens are chosen on the host, which is slower: no libvkvx for this test"
    ]
    assert sampling.open_sampler(backend.engines, backend.gpu, 4, MAX_VOCAB + 1) is None
    assert "524,289 tokens are more than 524,288" in caplog.text


def test_the_plugin_is_asked_before_a_built_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def load(path: Path) -> str:
        tried.append(path.name)
        if path.name == "old.so":
            raise DependencyError("another version")
        return path.name

    monkeypatch.setattr(sampling, "KernelLibrary", load)
    monkeypatch.setattr(sampling.build, "find_library", lambda: tmp_path / "libvkvx.so")
    cases = {("new.so", False): "new.so", ("old.so", False): "libvkvx.so", ("new.so", True): "libvkvx.so"}
    for (name, embedded), expected in cases.items():
        assert sampling.open_kernels(tmp_path, PluginInfo(name, "0" * 64, embedded)) == expected  # type: ignore[comparison-overlap]
    assert sampling.open_kernels(tmp_path, None) == "libvkvx.so"  # type: ignore[comparison-overlap]
    assert tried == ["new.so", "old.so", "libvkvx.so", "libvkvx.so", "libvkvx.so"]
    monkeypatch.setattr(sampling.build, "find_library", lambda: None)
    with pytest.raises(DependencyError, match="run `vkvx build BUNDLE --force`"):
        sampling.open_kernels(tmp_path, None)
