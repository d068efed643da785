"""Fused decode steps: which layers are known, what runs without Triton, how near the kernels are to exact results."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from vkvx import ExportOptions
from vkvx.manifest import Graph, Manifest
from vkvx.models.presets import preset_config
from vkvx.models.registry import family_of
from vkvx.models.tiny_presets import TINY_PRESETS
from vkvx.runtime.backends.torch import backend as torch_backend
from vkvx.runtime.backends.torch import fused
from vkvx.runtime.backends.torch.backend import TorchBackend
from vkvx.runtime.backends.torch.projections import merge_projections
from vkvx.runtime.calls import build_call

AS_THEY_ARE = {
    "tiny-gemma4": "inputs of every layer",
    "tiny-gemma4-e": "inputs of every layer",
    "tiny-glm-4.1v": "interleaved rotary embedding",
    "tiny-glm-4.6v": "interleaved rotary embedding",
    "tiny-glm-ocr": "interleaved rotary embedding",
    "tiny-ministral3": "queries scaled by their position",
    "tiny-qwen3.5": "linear attention, and gates of the attention's output",
}
"""Presets whose layers are not fused, and what the kernels do not compute."""


def test_known_layers() -> None:
    for preset in TINY_PRESETS:
        config = preset_config(preset)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
        text: Any = family_of(model).text_model(model)
        assert not any(fused.known_norms(layer) for layer in text.layers)  # their projections are apart
        merge_projections(text)
        known = [fused.known_norms(layer) is not None for layer in text.layers]
        assert known == [preset not in AS_THEY_ARE] * len(known), preset


def test_a_changed_part_is_not_known() -> None:
    config = preset_config("tiny")
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    layers: Any = family_of(model).text_model(model).layers
    merge_projections(layers)
    assert all(fused.known_norms(layer) for layer in layers)
    layers[0].mlp.act_fn = nn.ReLU()

    class Patched(type(layers[1].self_attn)):  # type: ignore[misc]
        pass

    layers[1].self_attn.__class__ = Patched
    assert [fused.known_norms(layer) for layer in layers] == [None, None]


def test_a_fused_layer_is_freed_with_its_model() -> None:
    """Without the collector of cycles: a session that is closed gives its weights back at once."""
    config = preset_config("tiny")
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    text: Any = family_of(model).text_model(model)
    merge_projections(text)
    kernels: Any = object()
    for layer in text.layers:
        norms = fused.known_norms(layer)
        assert norms is not None
        layer.forward = fused._FusedLayer(layer, norms, kernels)
    text.norm.forward, model.lm_head.forward = fused._LastNorm(text.norm, kernels), fused._Head(model.lm_head, kernels)
    modules = [weakref.ref(module) for module in (*text.layers, text.norm, model.lm_head)]
    gc.collect()
    gc.disable()
    try:
        del layer, text, model
        assert [module() for module in modules] == [None] * len(modules)
    finally:
        gc.enable()


@pytest.mark.parametrize(("columns", "stride"), [(5, 8), (9, 16)])
def test_a_head_of_an_odd_number_of_tokens(columns: int, stride: int) -> None:
    """Small integers: exact in any order of summation."""
    generator = torch.Generator().manual_seed(columns)
    x, weight = (torch.randint(-4, 5, (n, 24), generator=generator).float() for n in (3, columns))
    head = nn.Linear(24, columns, bias=False)
    head.weight.data = weight
    head.forward = fused._Head(head, None)  # type: ignore[method-assign, arg-type]
    with torch.no_grad():
        for shape in ((3,), (1, 3)):
            found = head(x.view(*shape, 24))
            assert found.shape == (*shape, columns)
            assert found.stride()[-2:] == (stride, 1)
            assert torch.equal(found.view(3, columns), x @ weight.T)


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert fused.fuse(nn.Module(), nn.Linear(2, 2)) == 0
    expected = "decode steps run as transformers' modules, which takes longer: the Python package 'triton' is missing"
    assert caplog.messages == [expected]


def _exact(x: Tensor, norm: fused.Norm | None) -> Tensor:
    x = x.double()
    if norm is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (norm.weight.double() + norm.shift)


def _kernels() -> Any:
    pytest.importorskip("triton")
    from vkvx.runtime.backends.torch.step_kernels import Kernels

    return Kernels(torch.cuda.get_device_capability() >= (9, 0))


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _close(found: Tensor, exact: Tensor, terms: int = 1) -> None:
    """Rounded once, after sums of so many FP32 terms, whose errors are taken to be random."""
    scale = exact.abs().max()
    unit = torch.finfo(found.dtype).eps / 2 + 4 * terms**0.5 * torch.finfo(torch.float32).eps
    assert torch.isfinite(found).all()
    assert (found.double() - exact).abs().max() <= 1.5 * unit * scale


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "columns", "dtype", "bias", "activation"),
    [
        (2048, 100, torch.float16, False, "silu"),
        (5000, 7, torch.float16, True, "gelu"),
        (3584, 513, torch.bfloat16, True, "silu"),
        (96, 64, torch.float32, False, "gelu"),
    ],
)
def test_products(size: int, columns: int, dtype: torch.dtype, bias: bool, activation: str) -> None:
    torch.manual_seed(0)
    kernels = _kernels()
    x, residual = _random(1, size, dtype=dtype) * 3, _random(1, columns, dtype=dtype)
    norm = fused.Norm(_random(size, dtype=dtype), 1e-5, 1.0)
    options: Any = {"bias": bias, "device": "cuda", "dtype": dtype}
    pair, single = nn.Linear(size, 2 * columns, **options), nn.Linear(size, columns, **options)
    with torch.no_grad():
        exact = deepcopy(single).double()(x.double())
        _close(kernels.product(x, single), exact, size)
        found = kernels.product(x, single, residual=residual, factor=0.25)
        _close(found, residual.double() + 0.25 * exact, size)
        gate, up = deepcopy(pair).double()(_exact(x, norm)).chunk(2, -1)
        gate = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
        _close(kernels.product(x, pair, norm=norm, activation=activation), gate * up, size)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_rotations_and_gates(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernels = _kernels()
    for tokens, size in ((1, 64), (5, 1000), (70, 4096)):
        x, residual = _random(tokens, size, dtype=dtype) * 2, _random(tokens, size, dtype=dtype)
        norm = fused.Norm(_random(size, dtype=dtype), 1e-6, 0.0)
        _close(kernels.norm(x, norm), _exact(x, norm), size)
        _close(kernels.norm_added(x, residual, norm), residual.double() + _exact(x, norm), size)
        summed, normed = kernels.added_norm(x, residual, norm, 0.5)
        _close(summed, residual.double() + 0.5 * x.double())
        _close(normed, _exact(summed, norm), size)
        gate, up = x.double().chunk(2, -1)
        _close(kernels.gate(x, "silu"), silu(gate) * up)
    for dim, heads in ((64, (4, 2)), (80, (3, 1)), (256, (2, 2))):
        count = sum(heads) + heads[1]
        qkv = _random(6, count * dim, dtype=dtype)
        angle = torch.rand(6, dim, device="cuda") * 9
        turns = [angle.cos().to(dtype), angle.sin().to(dtype)]
        for norms in ([], [fused.Norm(_random(dim, dtype=dtype), 1e-6, 1.0) for _ in range(2)]):
            parts = list(qkv.view(6, count, dim).double().split([*heads, heads[1]], 1))
            for i in range(2):
                part = _exact(parts[i], norms[i]) if norms else parts[i]
                half = torch.cat([-part[..., dim // 2 :], part[..., : dim // 2]], -1)
                parts[i] = part * turns[0].double()[:, None] + half * turns[1].double()[:, None]
            turned = qkv.clone()
            kernels.rotate(turned, turns, heads, norms)
            _close(turned, torch.cat(parts, 1).flatten(1), dim)
            values = slice(sum(heads) * dim, None)
            assert torch.equal(turned[:, values], qkv[:, values])


def _logits(preset: str, dtype: torch.dtype, lengths: list[int], rows: int) -> tuple[list[np.ndarray], int]:
    """Logits [rows, V] of calls of text, and how many layers are fused."""
    torch.manual_seed(0)
    config = preset_config(preset)
    model = getattr(transformers, config.architectures[0])(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        # Norms and biases that do something, and logits that tell tokens apart.
        weight.data = torch.randn_like(weight) * (0.2 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
        if "norm" in name:
            weight.data += 1
    model.tie_weights()
    model, family = model.to("cuda", dtype), family_of(model)
    name = str(dtype).removeprefix("torch.")
    info = family.info(model.config, name)
    quantization = ExportOptions(bits=16, dtype=name).resolve(info.cached_layers, info.typical_tokens)
    manifest = Manifest("", 1, info, quantization, {"vision": Graph("", 18, (), ())}, ".", {})
    opened = TorchBackend(model, family, manifest, slots=rows, visual_tokens=0, text_tokens=64)
    rng, found = np.random.default_rng(0), []
    for length in lengths:
        fed = [opened.cache.row(row, rng.integers(5, 90, length).astype(np.int32)) for row in range(rows)]
        found.append(opened.step(build_call(fed, group_size=1, image_token_id=info.image_token_id), None))
    layers: Any = family.text_model(model).layers
    count = sum("forward" in vars(layer) for layer in layers)
    opened.close()
    return found, count


@pytest.mark.gpu
@pytest.mark.kernels
@pytest.mark.parametrize("preset", sorted(set(TINY_PRESETS) - set(AS_THEY_ARE)))
def test_as_near_to_float32_as_the_modules(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one to eight tokens for one and for five rows: what is rounded is rounded by the modules, too."""
    pytest.importorskip("triton")
    lengths = [12, 1, 3, 1, 8]
    for rows in (1, 5):
        found, fuse = {}, torch_backend.fuse
        for way in ("exact", "modules", "fused"):
            monkeypatch.setattr(torch_backend, "fuse", fuse if way == "fused" else lambda *_: 0)
            found[way], count = _logits(preset, torch.float32 if way == "exact" else torch.float16, lengths, rows)
            assert (count > 0) == (way == "fused")
        errors = {way: np.abs(np.subtract(found[way], found["exact"])).max() for way in ("modules", "fused")}
        assert 0 < errors["fused"] < 2 * errors["modules"]
