"""What the GPU benchmarks share: times of captured calls, the copy bandwidth, and calls of the operator."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from vkvx.errors import DependencyError
from vkvx.plugins import build
from vkvx.plugins.library import KERNELS, KernelLibrary, Params
from vkvx.plugins.operator import OperatorAttributes


def library() -> KernelLibrary:
    """The built library; DependencyError without it or without a GPU for torch."""
    import torch

    if not torch.cuda.is_available():
        raise DependencyError("this benchmark needs an NVIDIA GPU and a torch built for it")
    path = build.find_library()
    if path is None:
        raise DependencyError("the CUDA kernels are not built; run `vkvx plugin build`")
    return KernelLibrary(path)


class DecodeShape(NamedTuple):
    """A decode step: one new position per row over `cached` visual tokens per row."""

    rows: int
    query_heads: int
    kv_heads: int
    cached: int
    group_size: int
    head_dim: int = 128


def environment() -> dict[str, Any]:
    """The GPU, its software and the hash of the library that a run used; empty without a GPU or without torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    path, smi = build.find_library(), shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split() if smi else []
    cudnn = torch.backends.cudnn.version()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else None,
        "cuda": torch.version.cuda,
        "cudnn": cudnn and f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
        "libvkvx_sha256": path and hashlib.sha256(path.read_bytes()).hexdigest(),
        "sources": build.source_hash(),
    }


def relative_error(output: Any, expected: Any) -> float:
    """Norm of the difference over the norm of the float64 `expected`; infinite where the output is not finite."""
    error = float((output.double() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


def microseconds(call: Callable[[], Any], *, inner: int | None = None, repeats: int = 11, cold: bool = False) -> float:
    """Median time of one call, from replays of a CUDA graph of `inner` calls; by default 3 to 20, near 1 ms.

    `cold`: something else fills the level-2 cache before each call, as the weights of a model do between two layers;
    its own time is subtracted.
    """
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    inner = inner or min(20, max(3, int(1 / start.elapsed_time(end))))
    rounds = ((_fill_level2, call), (_fill_level2,)) if cold else ((call,),)
    graphs = [_capture(calls, inner) for calls in rounds]
    # In turns, so that whatever slows the GPU slows both.
    times = [[_elapsed(graph, start, end) for graph in graphs] for _ in range(repeats + 3)]
    return statistics.median(first - sum(rest) for first, *rest in times[3:]) * 1e3 / inner


def _capture(calls: tuple[Callable[[], Any], ...], inner: int) -> Any:
    """A CUDA graph of `inner` rounds of the calls."""
    import torch

    for call in calls:  # what is set up on first use cannot be captured
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            for call in calls:
                call()
    return graph


def _elapsed(graph: Any, start: Any, end: Any) -> float:
    """Milliseconds of one replay."""
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _fill_level2() -> None:
    """Read 160 MiB, over twice the level-2 cache of a GPU of today; what is read leaves nothing to write back."""
    import torch

    buffer, total = _fill_buffers()
    torch.sum(buffer, 0, out=total)


@functools.cache
def _fill_buffers() -> tuple[Any, Any]:
    import torch

    return torch.zeros(40 << 20, device="cuda"), torch.zeros((), device="cuda")


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 1 GiB, in GB/s."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 4 * source.numel() / statistics.median(times) / 1e6


class OperatorCall:
    """An operator call of `rows` rows on caches of its own; `attend` and `append` launch it on the current stream.

    Tensors are FP16: query [B, Hq, S, D], key and value [B, Hkv, S, D]; `visual` of the call's S positions are visual
    tokens, the rest text. `cached` visual and `text` text tokens a row are in the cache: random words, random levels,
    random text rows of `text_bits`.
    """

    def __init__(
        self,
        kernels: KernelLibrary,
        *,
        rows: int,
        query_heads: int,
        kv_heads: int,
        positions: int = 1,
        cached: int = 0,
        text: int = 0,
        visual: int = 0,
        group_size: int = 256,
        bits: int = 1,
        quantizer: str = "lloyd",
        correction: str = "expected",
        kernel: str = "auto",
        head_dim: int = 128,
        sliding_window: int = 0,
        text_bits: int = 16,
    ) -> None:
        import torch

        from vkvx.plugins.reference import text_rows

        self.kernels, d, lead = kernels, head_dim, (rows, kv_heads)

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, device="cuda", dtype=torch.float16)

        def integers(values: Any) -> Any:
            return torch.as_tensor(values, dtype=torch.int32).repeat(rows, 1).cuda()

        groups = -(-max(cached, visual, 1) // group_size)
        capacity = groups * group_size
        index = [*range(visual), *([-1] * (-visual % group_size))]
        words = [
            torch.randint(-(2**31), 2**31, (*lead, capacity // 128, bits, *s), dtype=torch.int32, device="cuda")
            for s in ((128, d // 32), (d, 4))
        ]
        scale = torch.rand(*lead, groups, 1, d, device="cuda") / (2**bits - 1) + 0.1
        params = torch.cat([2 * scale, -scale * (2**bits - 1), 0.3 * scale], 3).half()
        counts = [min(group_size, max(0, cached - g * group_size)) for g in range(groups)]
        self.tensors = {
            "query": normal(rows, query_heads, positions, d),
            "key": normal(*lead, positions, d),
            "value": normal(*lead, positions, d),
            "visual_index": integers(index),
            "text_index": integers(range(visual, positions)),
            "slot": torch.arange(rows, dtype=torch.int32, device="cuda"),
            "visual_key": words[0],
            "visual_key_params": params,
            "visual_value": words[1],
            "visual_value_params": params[:, :, :, :2].contiguous(),
            "visual_count": integers(counts),
            "text_key": normal(*lead, max(16, text + positions), d),
            "text_value": normal(*lead, max(16, text + positions), d),
            "text_count": torch.full((rows,), text, dtype=torch.int32, device="cuda"),
        }
        self.text = text
        if text_bits == 8:
            for name in ("text_key", "text_value"):
                self.tensors[name] = text_rows.encode(self.tensors[name])
        if quantizer == "shaped":
            root = normal(kv_heads, d, d).float()
            metric = (root @ root.transpose(1, 2) / d + 0.1 * torch.eye(d, device="cuda")).half()
            angle = torch.rand(rows, d // 2, device="cuda").repeat(1, 2)
            rotation = torch.stack([angle.cos(), angle.sin()], 1)
            self.tensors |= {"key_metric": metric, "value_metric": metric.clone(), "rotation": rotation}
        if sliding_window:
            last = torch.arange(positions, dtype=torch.int32) + cached - sliding_window + 1
            start = torch.stack([last.clamp(min=0), torch.zeros_like(last)])
            self.tensors["window_start"] = start.repeat(rows, 1, 1).cuda()
        self.output = torch.empty_like(self.tensors["query"])
        self.group_size, self.counts, self.attribute_scale, self.correction = group_size, counts, d**-0.5, correction
        attributes = OperatorAttributes(
            key_bits=bits,
            value_bits=bits,
            group_size=group_size,
            quantizer=quantizer,
            quantile_alpha_key=0.1,
            quantile_alpha_value=0.1,
            shrink_value=0.5,
            score_correction=correction,
            scale=self.attribute_scale,
            sliding_window=sliding_window,
            text_bits=text_bits,
        )
        self.params = Params.of(self.tensors, attributes, self.output)
        self.params.kernel = KERNELS[kernel]
        size = kernels.workspace_bytes(self.params)
        self._workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.params.workspace, self.params.workspace_bytes = self._workspace.data_ptr(), size
        visual_bytes = sum(-(-c // 128) for c in counts) * 32 * d * bits + sum(c > 0 for c in counts) * 10 * d
        self.cache_bytes = rows * kv_heads * (visual_bytes + text * (4 * d if text_bits == 16 else 2 * (d + 4)))

    def attend(self) -> Any:
        """Launch the attention; returns the output tensor."""
        import torch

        self.kernels.attention(self.params, torch.cuda.current_stream().cuda_stream)
        return self.output

    def append(self) -> None:
        """Launch the append."""
        import torch

        self.kernels.append(self.params, torch.cuda.current_stream().cuda_stream)

    def step(self) -> Any:
        """Launch both, at once where the call allows it; returns the output tensor."""
        import torch

        self.kernels.step(self.params, torch.cuda.current_stream().cuda_stream)
        return self.output

    def dequantized(self, rows: int) -> tuple[Any, Any]:
        """Cached visual keys and values of the first rows, FP32 [rows, Hkv, cached, D]."""
        import torch

        from vkvx.plugins.reference import quantization

        valid = (torch.arange(self.group_size)[None] < torch.tensor(self.counts)[:, None]).flatten().cuda()
        found = []
        for name, unpack in (("key", quantization.unpack_keys), ("value", quantization.unpack_values)):
            codes = unpack(self.tensors[f"visual_{name}"][:rows]).unflatten(2, (-1, self.group_size))
            levels = self.tensors[f"visual_{name}_params"][:rows]
            found.append(quantization.decode(codes, levels[..., 0, :], levels[..., 1, :]).flatten(2, 3)[:, :, valid])
        return found[0], found[1]

    def expected(self, rows: int) -> Any:
        """Float64 [rows, Hq, 1, D] that a decode step should give for the first rows; the own token takes part."""
        import torch

        from vkvx.plugins.reference import text_rows

        t, scale, params = self.tensors, self.attribute_scale, self.params
        key, value = (x.double() for x in self.dequantized(rows))
        query = t["query"][:rows].double().unflatten(1, (key.shape[1], -1)).squeeze(3)
        scores = query @ key.transpose(2, 3) * scale
        if self.correction == "expected":
            residual = t["visual_key_params"][:rows, :, :, 2].double()
            excess = 0.5 * scale**2 * query.square() @ residual.square().transpose(2, 3)
            counts = torch.tensor(self.counts, device="cuda")
            scores = scores + (excess / (1 + excess / params.correction_limit)).repeat_interleave(counts, dim=-1)
        elif self.correction == "affine":
            low, high = scores.amin(-1, True), scores.amax(-1, True)
            scores = low + (scores - low) * ((high - params.tau - low) / (high - low)).clamp(min=0)
        if params.sliding_window:
            scores[..., : int(t["window_start"][0, 0, 0])] = -math.inf
        rest = []  # keys and values of cached text, then of the own token
        for name in ("key", "value"):
            text = t[f"text_{name}"][:rows, :, : self.text]
            text = text_rows.decode(text, torch.float16) if params.text_bits == 8 else text
            rest.append(torch.cat([text.double(), t[name][:rows].double()], 2))
        weights = torch.cat([scores, query @ rest[0].transpose(2, 3) * scale], -1).softmax(-1)
        return (weights @ torch.cat([value, rest[1]], 2)).flatten(1, 2).unsqueeze(2)
