"""The torch ops on CUDA tensors: conversations against the NumPy oracle, and generate() with the packed cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from operator_cases import CACHES, INPUTS, MASKS, Arrays, Dims, attributes_for, check, empty_state, new_call
from oracle import Attributes
from samples import CHECKPOINT, Page
from test_reference_op import CONVERSATION
from torch_calls import arguments, arrays, in_order, tensors

from vkvx.errors import VkvxError
from vkvx.plugins import torch_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]

SLACK = {"float32": 2e-6, "float16": 1.5e-3, "bfloat16": 1.2e-2}
GUARD = 4096


def guarded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor in the middle of a buffer of bytes of its own, and the whole buffer."""
    size = x.numel() * x.element_size()
    buffer = torch.full((size + 2 * GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
    inner = buffer[GUARD : GUARD + size].view(x.dtype).view(x.shape)
    inner.copy_(x)
    return inner, buffer


def call(inputs: Arrays, attributes: Attributes, dims: Dims) -> Arrays:
    """One call of the in-place op; what surrounds the caches must not change."""
    named, buffers = {}, []
    for name, x in tensors(inputs, dims.float_type).items():
        named[name], buffer = guarded(x)
        buffers.append(buffer)
    output = torch.ops.vkvx.visual_kv_attention_(*in_order(named), **arguments(attributes))
    torch.cuda.synchronize()
    for buffer in buffers:
        assert (buffer[:GUARD] == 0xA5).all()
        assert (buffer[-GUARD:] == 0xA5).all()
    results = arrays({"output": output.cpu()} | {name: named[name].cpu() for name in CACHES})
    return check(inputs, results, attributes, dims, SLACK[dims.float_type])


def converse(attributes: Attributes, dims: Dims, seed: int) -> None:
    rng = np.random.default_rng(seed)
    state = empty_state(dims, attributes, rng)
    for rows, padding in CONVERSATION:
        inputs = new_call(rows, state, dims, attributes, rng, **padding)  # type: ignore[arg-type]
        state = call(inputs, attributes, dims)


@pytest.mark.parametrize("quantizer", ["lloyd", "quantile", "shrink", "minmax"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_conversations(quantizer: str, bits: int, head_dim: int) -> None:
    i = bits + head_dim // 32 + len(quantizer)
    correction = ("none", "expected", "affine")[i % 3]
    dims = Dims(
        query_heads=(4, 2, 7)[i % 3],
        kv_heads=(2, 2, 1)[i % 3],
        head_dim=head_dim,
        float_type=("float16", "bfloat16", "float32")[i % 3 if i % 2 else 0],
    )
    attributes = attributes_for(
        bits, 9 - bits if bits in (1, 8) else bits, quantizer=quantizer, score_correction=correction
    )
    converse(attributes, dims, seed=i)


@pytest.mark.parametrize("more", MASKS, ids=str)
@pytest.mark.parametrize("float_type", SLACK)
@pytest.mark.parametrize("bits", [1, 16])
def test_windows_masks_and_softcaps(bits: int, float_type: str, more: dict[str, object]) -> None:
    attributes = attributes_for(bits, bits, **more)
    converse(attributes, Dims(text_rows=170, head_dim=64, float_type=float_type), seed=bits)


@pytest.mark.parametrize("more", [{}, {"sliding_window": 3, "visual_mask": "run"}], ids=str)
@pytest.mark.parametrize("float_type", SLACK)
def test_text_rows_of_8_bits(float_type: str, more: dict[str, object]) -> None:
    converse(attributes_for(1, 1, text_bits=8, **more), Dims(head_dim=64, float_type=float_type), seed=2)


@pytest.mark.parametrize("float_type", SLACK)
def test_conversations_at_16_bits(float_type: str) -> None:
    converse(attributes_for(16, 16), Dims(text_rows=170, head_dim=64, float_type=float_type), seed=1)


@pytest.mark.parametrize("quantizer", ["lloyd", "quantile", "shrink", "minmax"])
def test_numbers_that_are_none(quantizer: str) -> None:
    dims = Dims(head_dim=64, kv_heads=1, query_heads=1, slots=1, float_type="float16")
    attributes = attributes_for(1, 2, quantizer=quantizer, scale=0.01)
    rng = np.random.default_rng(5)
    inputs = new_call([(0, "p100 t1")], empty_state(dims, attributes, rng), dims, attributes, rng)
    inputs["key"][0, 0, 3, 7] = np.nan
    inputs["key"][0, 0, 5, :4] = np.inf, -np.inf, 65504, -65504
    inputs["key"][0, 0, :, 9] = 2.5
    named = {name: x.cuda() for name, x in tensors(inputs, "float16").items()}
    torch.ops.vkvx.visual_kv_attention_(*(named[n] for n in INPUTS), **arguments(attributes))
    clean = {**inputs, "query": np.zeros_like(inputs["query"]), "key": np.nan_to_num(inputs["key"], nan=0.0)}
    results = arrays({"output": torch.zeros(inputs["query"].shape)} | {n: named[n].cpu() for n in CACHES})
    import oracle

    finite = {**clean, "key": np.clip(clean["key"], -65504, 65504)}
    expected = oracle.visual_kv_attention(finite, attributes, "float16")
    group = expected.appended[0]
    params = results["visual_key_params"][0, 0, 0].astype(np.float64)
    assert np.isfinite(params).all()
    assert params[0, 9] == 0
    assert params[1, 9] == 2.5
    assert group.key.shape[1] == 100


def test_a_graph_and_the_workspace_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture finds the workspace of its stream, or is refused; a larger call leaves what the graph holds."""
    workspaces = torch_cuda.Workspaces(
        lambda device, size: torch.zeros(size, dtype=torch.uint8, device=device), torch.cuda.is_current_stream_capturing
    )
    monkeypatch.setattr(torch_cuda, "_WORKSPACES", workspaces)
    dims, attributes = Dims(head_dim=64, float_type="float16"), attributes_for(1, 1)
    rng = np.random.default_rng(3)

    def prepared(rows: list[tuple[int, str]]) -> dict[str, torch.Tensor]:
        inputs = new_call(rows, empty_state(dims, attributes, rng), dims, attributes, rng)
        return {name: x.cuda() for name, x in tensors(inputs, "float16").items()}

    def attend(named: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.ops.vkvx.visual_kv_attention_(*(named[n] for n in INPUTS), **arguments(attributes))

    step, stream = prepared([(0, "t1")]), torch.cuda.Stream()
    with pytest.raises(VkvxError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        attend(step)
    torch.cuda.synchronize()
    expected = attend(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = attend(step)
    held = workspaces.get(output.device, stream.cuda_stream, 0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        attend(prepared([(row, "p300 t40") for row in range(dims.slots)]))
        larger = workspaces.get(output.device, stream.cuda_stream, held.numel() + 1)
        graph.replay()
    torch.cuda.synchronize()
    assert larger.data_ptr() != held.data_ptr()
    assert workspaces._kept == [held]
    assert torch.equal(output, expected)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 1), ("float16", 4), ("bfloat16", 2)])
def test_generate_on_the_gpu_as_on_the_cpu(pages: list[Page], dtype: str, bits: int) -> None:
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    import vkvx

    processor = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")
    texts: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype).to(device).eval()
        images = [Image.open(page.path) for page in pages[:2]]
        prompts = ["USER: <image>\nTranscribe the page. ASSISTANT:"] * 2
        inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True).to(
            device, getattr(torch, dtype)
        )
        with vkvx.quantize_visual_cache(model, bits=bits):
            texts[device] = processor.batch_decode(model.generate(**inputs, max_new_tokens=24, do_sample=False))
    assert texts["cuda"] == texts["cpu"]
