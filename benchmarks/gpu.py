"""What the GPU benchmarks share: times of captured calls, the copy bandwidth, and calls of the operator."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from typing import Any

from vkvx.errors import DependencyError
from vkvx.plugins import build
from vkvx.plugins.library import CORRECTIONS, DTYPES, KERNELS, QUANTIZERS, Library, Params


def library() -> Library:
    """The built library; DependencyError without it or without a GPU for torch."""
    import torch

    if not torch.cuda.is_available():
        raise DependencyError("this benchmark needs an NVIDIA GPU and a torch built for it")
    path = build.find_library()
    if path is None:
        raise DependencyError("the CUDA kernels are not built; run `vkvx plugin build`")
    return Library(path)


def microseconds(call: Callable[[], Any], *, inner: int = 10, repeats: int = 15) -> float:
    """Median time of one call, from replays of a CUDA graph of `inner` calls."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / inner


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


class Call:
    """An operator call of `rows` rows on caches of its own; `attend` and `append` launch it on the current stream.

    Tensors are FP16: query [B, Hq, S, D], key and value [B, Hkv, S, D]; `visual` of the call's S positions are visual
    tokens, the rest text. `cached` visual tokens a row are in the cache: random words, random levels.
    """

    def __init__(
        self,
        kernels: Library,
        *,
        rows: int,
        query_heads: int,
        kv_heads: int,
        positions: int = 1,
        cached: int = 0,
        visual: int = 0,
        group_size: int = 256,
        bits: int = 1,
        quantizer: str = "lloyd",
        correction: str = "expected",
        kernel: str = "auto",
        head_dim: int = 128,
    ) -> None:
        import torch

        self.kernels, d, lead = kernels, head_dim, (rows, kv_heads)

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, device="cuda", dtype=torch.float16)

        def integers(values: Any) -> Any:
            return torch.as_tensor(values, dtype=torch.int32).repeat(rows, 1).cuda()

        groups = -(-max(cached, visual, 1) // group_size)
        capacity = groups * group_size
        index = [*range(visual), *([-1] * (-visual % group_size))]
        words = [
            torch.randint(-(2**31), 2**31, (*lead, capacity // 128, bits, *s), device="cuda")
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
            "visual_key": words[0].to(torch.int32),
            "visual_key_params": params,
            "visual_value": words[1].to(torch.int32),
            "visual_value_params": params[:, :, :, :2].contiguous(),
            "visual_count": integers(counts),
            "text_key": normal(*lead, max(16, positions), d),
            "text_value": normal(*lead, max(16, positions), d),
            "text_count": torch.zeros(rows, dtype=torch.int32, device="cuda"),
        }
        if quantizer == "shaped":
            root = normal(kv_heads, d, d).float()
            metric = (root @ root.transpose(1, 2) / d + 0.1 * torch.eye(d, device="cuda")).half()
            angle = torch.rand(rows, d // 2, device="cuda").repeat(1, 2)
            rotation = torch.stack([angle.cos(), angle.sin()], 1)
            self.tensors |= {"key_metric": metric, "value_metric": metric.clone(), "rotation": rotation}
        self.output = torch.empty_like(self.tensors["query"])
        self.group_size, self.counts, self.attribute_scale = group_size, counts, d**-0.5
        addresses = {name: x.data_ptr() if x.numel() else 256 for name, x in self.tensors.items()}
        self.params = Params(
            **addresses,
            output=self.output.data_ptr(),
            dtype=DTYPES["float16"],
            rows=rows,
            positions=positions,
            slots=rows,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=d,
            group_size=group_size,
            visual_capacity=capacity,
            text_capacity=max(16, positions),
            visual_entries=len(index),
            text_entries=positions - visual,
            key_bits=bits,
            value_bits=bits,
            quantizer=QUANTIZERS[quantizer],
            correction=CORRECTIONS[correction],
            kernel=KERNELS[kernel],
            quantile_alpha_key=0.1,
            quantile_alpha_value=0.1,
            shrink_key=0.5,
            shrink_value=0.5,
            tau=3.0,
            correction_limit=3.0,
            scale=self.attribute_scale,
        )
        for name in ("query", "key", "value"):
            strides: ctypes.Array[ctypes.c_int64] = getattr(self.params, f"{name}_stride")
            strides[:] = self.tensors[name].stride()[:3]
        size = kernels.workspace_bytes(self.params)
        self._workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.params.workspace, self.params.workspace_bytes = self._workspace.data_ptr(), size
        self.cache_bytes = (
            rows * kv_heads * (sum(-(-c // 128) for c in counts) * 32 * d * bits + sum(c > 0 for c in counts) * 10 * d)
        )

    def attend(self) -> Any:
        """Launch the attention; returns the output tensor."""
        import torch

        self.kernels.attention(self.params, torch.cuda.current_stream().cuda_stream)
        return self.output

    def append(self) -> None:
        """Launch the append."""
        import torch

        self.kernels.append(self.params, torch.cuda.current_stream().cuda_stream)

    def dequantized(self, rows: int) -> tuple[Any, Any]:
        """Cached visual keys and values of the first rows, FP32 [rows, Hkv, cached, D]."""
        import torch

        from vkvx import quantization

        valid = (torch.arange(self.group_size)[None] < torch.tensor(self.counts)[:, None]).flatten().cuda()
        found = []
        for name, unpack in (("key", quantization.unpack_keys), ("value", quantization.unpack_values)):
            codes = unpack(self.tensors[f"visual_{name}"][:rows]).unflatten(2, (-1, self.group_size))
            levels = self.tensors[f"visual_{name}_params"][:rows]
            found.append(quantization.decode(codes, levels[..., 0, :], levels[..., 1, :]).flatten(2, 3)[:, :, valid])
        return found[0], found[1]
