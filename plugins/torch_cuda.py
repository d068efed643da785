"""The CUDA implementation of the torch ops: ``libvkvx`` on the tensors of a call, caches in place.

Run for CUDA tensors by :mod:`vkvx.plugins.torch_op`. Where the library is not built, or a head is wider than
the kernels take, the reference runs instead.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from vkvx.format import CACHE_NAMES
from vkvx.plugins import build
from vkvx.plugins.c_interface import MAX_HEAD_DIM, MAX_SHAPED_GROUP, STRIDED
from vkvx.plugins.library import Library, Params
from vkvx.plugins.operator import OperatorAttributes

_WORKSPACES: dict[tuple[int, int], Tensor] = {}
"""By device and stream: zero before the first use, and shared by all layers."""
_OUTGROWN: list[Tensor] = []


@functools.cache
def kernels() -> Library | None:
    """The library that the CUDA implementation runs, or None (with one warning) if it has not been built."""
    path = build.find_library()
    if path is None:
        warnings.warn(
            "the CUDA kernels are not built, so the packed cache is slow; run `vkvx plugin build`",
            stacklevel=2,
        )
        return None
    return Library(path)


def takes(tensors: dict[str, Tensor], attributes: OperatorAttributes) -> bool:
    """Whether the kernels can run this call."""
    brings_pictures = tensors["visual_index"].shape[1] > 0
    if attributes.needs_metrics and brings_pictures and attributes.group_size > MAX_SHAPED_GROUP:
        return False
    return tensors["query"].shape[3] <= MAX_HEAD_DIM and kernels() is not None


def run(tensors: dict[str, Tensor], attributes: OperatorAttributes) -> Tensor:
    """Attend and append on the current stream: output [B, Hq, S, D]; the caches in ``tensors`` are updated in place.

    Tensors are the operator's inputs by name, checked before. What does not fit the caches is dropped: checking it here
    would wait for the device.
    """
    library = kernels()
    assert library is not None
    query = tensors["query"]
    with torch.cuda.device(query.device):
        stream = torch.cuda.current_stream().cuda_stream
        # Rows of a head are read as they lie, other layouts are copied.
        held = {name: x if name in STRIDED and x.stride(-1) == 1 else x.contiguous() for name, x in tensors.items()}
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        params = Params.of(held, attributes, output)
        workspace = _workspace(query.device, stream, library.workspace_bytes(params))
        params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.numel()
        library.attention(params, stream)
        library.append(params, stream)
        for name, x in held.items():
            if name in CACHE_NAMES and x is not tensors[name]:
                tensors[name].copy_(x)
    return output


def _workspace(device: torch.device, stream: int, size: int) -> Tensor:
    index = device.index if device.index is not None else torch.cuda.current_device()
    held = _WORKSPACES.get((index, stream))
    if held is None or held.numel() < size:
        # A captured graph keeps the addresses of its run, so an outgrown workspace stays allocated with the new one.
        if held is not None:
            _OUTGROWN.append(held)
        held = torch.zeros(size, dtype=torch.uint8, device=device)
        _WORKSPACES[index, stream] = held
    return held
