"""Bundles in onnxruntime with the custom operator: on a CPU, by a stub that the torch reference answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime_calls import Reference
from samples import Page

from vkvx import Session
from vkvx.errors import BundleError
from vkvx.manifest import Manifest
from vkvx.plugins import build
from vkvx.plugins.operator import model_attributes
from vkvx.runtime.backends.onnxruntime import kernels
from vkvx.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from vkvx.runtime.backends.onnxruntime.fusions import ATTENTION, Uses
from vkvx.runtime.backends.onnxruntime.lowering import COUNTS, data_sizes, use_operator
from vkvx.runtime.backends.onnxruntime.steps import DecodeSteps

PROMPT = "USER: <image>\nTranscribe the page. ASSISTANT:"


class Recorder:
    """The logits of a backend's calls, by number of positions."""

    def __init__(self, session: Session) -> None:
        self.logits: list[tuple[int, np.ndarray]] = []
        backend: Any = session.backend
        self._step, backend.step = backend.step, self._record

    def _record(self, call: Any, embeds: Any) -> np.ndarray:
        found: np.ndarray = self._step(call, embeds)
        self.logits.append((call.input_ids.shape[1], found.copy()))
        return found


@contextmanager
def with_operator(bundle: Path, stub: Path, slots: int) -> Iterator[tuple[Session, Reference]]:
    """A session whose attention runs as the custom operator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "find", lambda manifest, provider: stub)
        with Session.load(bundle, backend="onnxruntime", provider="cpu", slots=slots) as session:
            yield session, Reference(stub, model_attributes(session.manifest.layout))


@pytest.mark.parametrize(("bits", "rows"), [(16, 3), (1, 1)])
def test_the_answers_are_those_of_the_function(
    bundle_factory: Callable[..., Path], onnxruntime_stub: Path, pages: list[Page], bits: int, rows: int
) -> None:
    """Prefill and steps: three rows with pictures at 16 bits, whose step is padded to four, and text at 1 bit."""
    bundle = bundle_factory(bits=16) if bits == 16 else bundle_factory()
    prompts: Any = [PROMPT] * rows if bits == 16 else ["USER: one ASSISTANT:"]
    images: Any = [page.path for page in pages[:rows]] if bits == 16 else None
    with Session.load(bundle, backend="onnxruntime", provider="cpu", slots=4) as session:
        expected = Recorder(session)
        wanted = session.generate(prompts, images, max_new_tokens=4, ignore_eos=True)
    with with_operator(bundle, onnxruntime_stub, 4) as (session, reference):
        actual = Recorder(session)
        given = session.generate(prompts, images, max_new_tokens=4, ignore_eos=True)
    assert reference.failure is None
    assert [g.token_ids for g in given] == [w.token_ids for w in wanted]
    assert len(reference.calls) == 4 * 4  # layers, steps
    assert all(appends for _, appends in reference.calls)
    assert {params.rows for params, _ in reference.calls[4:]} == {4 if rows == 3 else 1}
    assert [positions for positions, _ in actual.logits] == [positions for positions, _ in expected.logits]
    for (_, one), (_, other) in zip(actual.logits, expected.logits, strict=True):
        # FP16 numbers of 4 layers and the head, each rounded a few times to 2^-11 of itself.
        assert np.abs(one - other).max() <= 16 * 2.0**-11 * np.abs(other).max()


def lowered(bundle: Path) -> onnx.ModelProto:
    model = onnx.load(str(bundle / "decoder.onnx"), load_external_data=False)
    use_operator(model)
    return model


@pytest.mark.parametrize("options", [{}, {"bits": 16}])
def test_what_the_graph_loses(bundle_factory: Callable[..., Path], options: dict[str, int]) -> None:
    bundle = bundle_factory(**options)
    model, before = lowered(bundle), onnx.load(str(bundle / "decoder.onnx"), load_external_data=False)
    assert not model.functions
    assert [info.name for info in model.graph.input] == [info.name for info in before.graph.input]
    assert [i.name for i in model.graph.output] == [i.name for i in before.graph.output if i.name not in COUNTS]
    kinds = [node.op_type for node in model.graph.node]
    layers = sum((node.domain, node.op_type) == ATTENTION for node in model.graph.node)
    assert layers == sum(node.op_type == ATTENTION[1] for node in before.graph.node) == 4
    assert kinds.count("SimplifiedLayerNormalization") == 2 * layers + 1
    assert "Pow" not in kinds
    assert list(data_sizes(Uses(before.graph)))
    assert list(data_sizes(Uses(model.graph))) == []


def test_a_cache_that_other_layers_read(tiny_bundle: Path) -> None:
    """Outputs that nothing reads are not asked for."""
    model = onnx.load(str(tiny_bundle / "decoder.onnx"), load_external_data=False)
    node = next(node for node in model.graph.node if (node.domain, node.op_type) == ATTENTION)
    dropped = set(node.output[1:])
    kept = [info for info in model.graph.output if info.name not in dropped]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    use_operator(model)
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == ATTENTION]
    assert [bool(name) for name in nodes[0].output] == [True] + [False] * 6
    assert all(all(node.output) for node in nodes[1:])


def test_it_is_found_where_it_is_built(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, override = Manifest.load(tiny_bundle), build.OVERRIDES[build.ONNXRUNTIME]
    monkeypatch.delenv(override, raising=False)
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.find(manifest, "cpu") is None
    with pytest.warns(UserWarning, match="which is slow; run `vkvx plugin build --onnxruntime`"):
        assert kernels.find(manifest, "cuda") is None
    library = tmp_path / "library.so"
    library.touch()
    monkeypatch.setenv(override, str(library))
    assert kernels.find(manifest, "cuda") == library
    wide = replace(manifest.model.layers[0], head_dim=1024)
    wider = replace(manifest, model=replace(manifest.model, layers=(wide, *manifest.model.layers[1:])))
    with pytest.warns(UserWarning, match=r"library\.so has no kernel for heads of 1024"):
        assert kernels.find(wider, "cuda") is None


def test_a_provider_that_captures_nothing(
    tiny_bundle: Path, onnxruntime_stub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The session is opened again without graphs, and a line says why."""
    opened, why = OnnxRuntimeBackend._open, "This session cannot use the graph capture feature as requested"

    def refuse(self: OnnxRuntimeBackend, name: str, *, captures: bool = False) -> Any:
        if captures:
            raise BundleError(why)
        return opened(self, name)

    monkeypatch.setattr(OnnxRuntimeBackend, "_open", refuse)
    with with_operator(tiny_bundle, onnxruntime_stub, 1) as (session, reference):
        backend: Any = session.backend
        assert backend._steps is None
        session.generate("USER: one ASSISTANT:", max_new_tokens=2, ignore_eos=True)
    assert reference.failure is None
    assert why in caplog.text


def test_a_step_that_cannot_be_captured(
    bundle_factory: Callable[..., Path],
    onnxruntime_stub: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The provider tells when it runs the first one: then it goes on without graphs, and the answer is the same."""
    bundle, why = bundle_factory(bits=16), "CUDA failure 901: operation failed due to a previous error during capture"
    prompt = "USER: one ASSISTANT:"
    with with_operator(bundle, onnxruntime_stub, 2) as (session, _):
        wanted = session.generate(prompt, max_new_tokens=4, ignore_eos=True)

    def fail(self: DecodeSteps, call: Any) -> np.ndarray:
        raise RuntimeError(why)

    monkeypatch.setattr(DecodeSteps, "run", fail)
    with with_operator(bundle, onnxruntime_stub, 2) as (session, reference):
        given = session.generate(prompt, max_new_tokens=4, ignore_eos=True)
    assert reference.failure is None
    assert given.token_ids == wanted.token_ids
    assert caplog.text.count(why) == 1
