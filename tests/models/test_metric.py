"""Metrics from a model's weights, and that export, plug-in and reference use the same ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from fakes import manifest
from safetensors.torch import load_file
from torch import Tensor

from vkvx.export.build import METRICS_FILE
from vkvx.manifest import LayerInfo, Manifest
from vkvx.models.family import AttentionWeights
from vkvx.models.graph.metric import FLOOR, REACH, Rotary, compute_metrics, model_metrics
from vkvx.models.registry import resolve
from vkvx.runtime.backends.torch.loading import load_model


@pytest.fixture(scope="module")
def source():
    return resolve("tiny-llava")


@pytest.fixture(scope="module")
def model(source):
    return load_model(source, torch.float32)


@pytest.fixture(scope="module")
def info(source):
    return source.info("float32")


def rotation(position: int, d: int) -> np.ndarray:
    """The rotary embedding of a position as a matrix, float64, from its definition (theta 10000)."""
    half = d // 2
    angle = position * 10000.0 ** (-np.arange(half) / half)
    matrix = np.zeros((d, d))
    i = np.arange(half)
    matrix[i, i] = matrix[i + half, i + half] = np.cos(angle)
    matrix[i, i + half], matrix[i + half, i] = -np.sin(angle), np.sin(angle)
    return matrix


def test_metrics_are_what_the_format_says(source, model, info) -> None:
    metrics = model_metrics(source.family, model, info)
    d, heads = info.layers[0].head_dim, info.layers[0].kv_heads
    share = info.query_heads // heads
    positions = np.unique(np.geomspace(1, REACH, 64).astype(int))
    for layer, block in enumerate(model.model.language_model.layers):
        attention = block.self_attn
        query = (attention.q_proj.weight * block.input_layernorm.weight).double().numpy()
        output = attention.o_proj.weight.double().numpy()
        for head in range(heads):
            key, value = np.zeros((d, d)), np.zeros((d, d))
            for h in range(head * share, (head + 1) * share):
                part = query[h * d : (h + 1) * d]
                for position in positions:
                    turned = rotation(position, d) @ part
                    key += turned @ turned.T
                columns = output[:, h * d : (h + 1) * d]
                value += columns.T @ columns
            for wanted, got in ((key, metrics.key), (value, metrics.value)):
                wanted = wanted / (np.trace(wanted) / d) + FLOOR * np.eye(d)
                found = got[layer][head]
                assert found.dtype == torch.float16
                assert np.allclose(found.numpy(), wanted, rtol=2e-3, atol=2e-4)


def test_the_rotation_of_a_call_is_the_models(source, model, info) -> None:
    metrics = model_metrics(source.family, model, info)
    cosine, sine = metrics.rotations(torch.tensor([0, 7, 900]))[0].double().unbind(1)
    d = info.layers[0].head_dim
    for row, position in enumerate((0, 7, 900)):
        matrix = rotation(position, d)
        assert np.allclose(cosine[row].numpy(), np.diag(matrix), atol=1e-4)
        assert np.allclose(sine[row, : d // 2].numpy(), np.diag(matrix[d // 2 :, : d // 2]), atol=1e-4)


def test_bundle_holds_the_metrics_of_the_weights(source, model, info, bundle_factory) -> None:
    bundle = bundle_factory(dtype="float32")
    stored = load_file(bundle / METRICS_FILE)
    metrics = model_metrics(source.family, model, info)
    for kind, tensors in (("key", metrics.key), ("value", metrics.value)):
        for layer, tensor in enumerate(tensors):
            assert torch.equal(stored.pop(f"{kind}.{layer}"), tensor)
    assert not stored
    assert METRICS_FILE in Manifest.load(bundle).files
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=True).graph
    initializers = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    nodes = [node for node in graph.node if node.domain == "vkvx"]
    for layer, node in enumerate(nodes):
        assert len(node.input) == 17
        assert np.array_equal(initializers[node.input[14]], metrics.key[layer].numpy())
        assert np.array_equal(initializers[node.input[15]], metrics.value[layer].numpy())
    assert len({node.input[16] for node in nodes}) == 1


def test_other_quantisers_need_no_metrics(bundle_factory) -> None:
    bundle = bundle_factory(bits=4, quantizer="minmax", score_correction="none")
    assert not (bundle / METRICS_FILE).exists()
    nodes = [n for n in onnx.load(bundle / "decoder.onnx", load_external_data=False).graph.node if n.domain]
    assert {len(node.input) for node in nodes} == {14}


def test_a_gate_behind_the_queries_of_a_head_does_not_count() -> None:
    info = replace(manifest().model, layers=(LayerInfo(kv_heads=2, head_dim=32, scale=1.0),), query_heads=4)
    random = torch.Generator().manual_seed(0)
    query, gate = torch.randn(2, 4, 32, 8, generator=random)
    norm, output = torch.randn(8, generator=random), torch.randn(8, 4 * 32, generator=random)
    both = AttentionWeights(torch.cat([query, gate], 1).flatten(0, 1), None, norm, output, norm_shift=1.0)
    alone = AttentionWeights(query.flatten(0, 1), None, norm + 1, output)

    def still(like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A rotary embedding that turns nothing."""
        return torch.ones(len(positions), 1, 32), torch.zeros(len(positions), 1, 32)

    (found,), _ = compute_metrics([both], {0: Rotary(still, 32)}, info)
    (expected,), _ = compute_metrics([alone], {0: Rotary(still, 32)}, info)
    assert torch.equal(found, expected)
    moment = (query * (norm + 1)) @ (query * (norm + 1)).transpose(1, 2)
    moment = moment.unflatten(0, (2, 2)).mean(1)[0]
    wanted = moment / moment.diagonal().mean() + FLOOR * torch.eye(32)
    torch.testing.assert_close(found[0].float(), wanted, rtol=2e-3, atol=2e-3)
