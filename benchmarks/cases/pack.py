"""Quantise-and-pack of new visual tokens: time, speed of reading keys and values, and the result beside torch's."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.lib import gpu
from vkvx.format import QUANTIZERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8], help="bits of keys and values")
    parser.add_argument("--rows", type=int, default=32, help="sequences (default 32)")
    parser.add_argument("--quantizers", nargs="+", default=QUANTIZERS, choices=QUANTIZERS, help="default: all")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: 3328 tokens a row in groups of 896, 8 KV heads of 128 channels."""
    import torch

    kernels, bandwidth = gpu.library(), gpu.copy_bandwidth()
    rows = []
    for quantizer in arguments.quantizers:
        for bits in arguments.bits:
            call = gpu.OperatorCall(
                kernels,
                rows=arguments.rows,
                query_heads=8,
                kv_heads=8,
                positions=3328,
                visual=3328,
                group_size=896,
                bits=bits,
                quantizer=quantizer,
            )
            time = gpu.microseconds(call.append, inner=2, repeats=8)
            read = 2 * call.tensors["key"].numel() * 2
            codes, error = _beside_torch(call, quantizer, bits)
            rows.append(
                {
                    "quantizer": quantizer,
                    "bits": bits,
                    "us": round(time, 1),
                    "% of copy": round(100 * read / time / 1e3 / bandwidth, 1),
                    "other codes %": float(f"{100 * codes:.2g}"),
                    "error": round(error, 6),
                    "copy GB/s": round(bandwidth),
                    "device": torch.cuda.get_device_name(),
                }
            )
            del call
            torch.cuda.empty_cache()
    return rows


def _beside_torch(call: gpu.OperatorCall, quantizer: str, bits: int) -> tuple[float, float]:
    """Share of codes of the first row that differ from torch's, and the squared error over that of torch's result.

    The error is that of keys and values together; with `shaped` in the metrics.
    """
    import torch

    from vkvx.plugins.reference import quantization, shaping

    size, count = call.group_size, call.tensors["key"].shape[2]
    groups, t = -(-count // size), call.tensors
    mask = (torch.arange(groups * size, device="cuda") < count).unflatten(0, (groups, size))
    different, errors = 0.0, [0.0, 0.0]
    for name, unpack in (("key", quantization.unpack_keys), ("value", quantization.unpack_values)):
        x = torch.nn.functional.pad(t[name][0], (0, 0, 0, groups * size - count)).unflatten(1, (groups, size))
        valid = mask.expand(x.shape[:-1])
        metric = torch.eye(x.shape[-1], device="cuda")
        if quantizer == "shaped":
            metric = t[f"{name}_metric"].float()
            if name == "key":
                metric = shaping.rotate(metric, *t["rotation"][0].unsqueeze(1))
            metric = metric.unsqueeze(1)
            wanted = shaping.shape(x, valid, bits, metric)
        else:
            wanted = quantization.quantize(x, valid, bits, quantizer, alpha=0.1, gamma=0.5)
        codes = unpack(t[f"visual_{name}"][:1])[0].unflatten(1, (groups, size))
        levels = t[f"visual_{name}_params"][0]
        found = quantization.Quantized(codes, levels[..., 0, :], levels[..., 1, :])
        different += (codes != wanted.codes)[valid].double().mean().item() / 2
        for i, result in enumerate((found, wanted)):
            residual = torch.where(valid.unsqueeze(-1), x.float() - quantization.decode(*result), 0.0)
            errors[i] += ((residual @ metric) * residual).sum(dtype=torch.float64).item()
    return different, errors[0] / errors[1]
