"""The CUDA implementation of the torch ops: ``libvkvx`` on the tensors of a call, caches in place.

Run for CUDA tensors by :mod:`vkvx.plugins.torch_op`. Where the library is not built, or a head is wider than
the kernels take, the reference runs instead.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from vkvx.errors import VkvxError
from vkvx.format import CACHE_NAMES
from vkvx.plugins import build
from vkvx.plugins.c_interface import MAX_HEAD_DIM, STRIDED
from vkvx.plugins.library import KernelLibrary, Params
from vkvx.plugins.operator import OperatorAttributes


class Workspaces:
    """Scratch memory of the kernels by device and stream, shared by all layers; it is zero before its first use.

    A CUDA graph keeps the addresses of its capture, and nothing says when it is gone: a workspace that a capture has
    met stays allocated after a larger one has taken its place. Others are freed then.
    """

    def __init__(self, allocate: Callable[[torch.device, int], Tensor], is_capturing: Callable[[], bool]) -> None:
        self._allocate, self._is_capturing = allocate, is_capturing
        self._held: dict[tuple[torch.device, int], tuple[Tensor, int]] = {}
        """And the thread that used it last."""
        self._captured: set[tuple[torch.device, int]] = set()
        self._kept: list[Tensor] = []

    def get(self, device: torch.device, stream: int, size: int) -> Tensor:
        """At least ``size`` bytes for the next call on this stream, the current one.

        Raises VkvxError where they would have to be allocated within a capture: they would come from the memory of that
        graph, and each of its replays would zero them.
        """
        place, capturing = (device, stream), self._is_capturing()
        held, _ = self._held.get(place, (None, 0))
        if held is None or held.numel() < size:
            found = self._take_over(device, size) if capturing else self._allocate(device, size)
            if held is not None and place in self._captured:
                self._kept.append(held)
            self._captured.discard(place)
            held = found
        if capturing:
            self._captured.add(place)
        self._held[place] = held, threading.get_ident()
        return held

    def _take_over(self, device: torch.device, size: int) -> Tensor:
        """The workspace of another stream, on which this thread ran the call before: torch captures on its own stream.

        What ran there is done, since whoever captures waits for it first; another thread might be running there now.
        """
        for place, (held, thread) in list(self._held.items()):
            is_own = thread == threading.get_ident() and place not in self._captured
            if is_own and place[0] == device and held.numel() >= size:
                del self._held[place]
                return held
        raise VkvxError(
            "this call needs a workspace, which cannot be allocated while a CUDA graph is captured: "
            "run the same call once before the capture, in the same thread"
        )


_WORKSPACES = Workspaces(
    lambda device, size: torch.zeros(size, dtype=torch.uint8, device=device), torch.cuda.is_current_stream_capturing
)


@functools.cache
def kernels() -> KernelLibrary | None:
    """The library that the CUDA implementation runs, or None (with one warning) if it has not been built."""
    path = build.find_library()
    if path is None:
        warnings.warn(
            "the CUDA kernels are not built, so the packed cache is slow; run `vkvx plugin build`",
            stacklevel=2,
        )
        return None
    return KernelLibrary(path)


def takes(tensors: dict[str, Tensor], attributes: OperatorAttributes) -> bool:
    """Whether the kernels can run this call."""
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
        workspace = _WORKSPACES.get(query.device, stream, library.workspace_bytes(params))
        params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.numel()
        library.step(params, stream)
        for name, x in held.items():
            if name in CACHE_NAMES and x is not tensors[name]:
                tensors[name].copy_(x)
    return output
