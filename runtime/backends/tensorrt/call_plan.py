"""What one call of an engine needs: the profile that takes it, its arrays padded to that profile, and their memory.

NumPy only: nothing here needs a GPU or TensorRT.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from vkvx.cache_layout import tensor_bytes
from vkvx.errors import CapacityError
from vkvx.runtime.backends.tensorrt.device import ALIGNMENT
from vkvx.runtime.cache import PackedCache, Shape
from vkvx.runtime.calls import PADDING, Call, decode_rows
from vkvx.runtime.engines.manifest import DECODE, DECODER, PREFILL, EngineManifest, Profile

COUNTS = ("visual_count", "text_count")

_FLAGS = {
    "rows": "--max-batch-size",
    "slots": "--max-slots",
    "positions": "--max-input-len",
    "text tokens": "--max-input-len",
    "visual tokens": "--max-visual-tokens",
    "groups": "--max-visual-tokens",
    "tiles": "--max-visual-tokens",
    "text rows": "--max-text-tokens",
}
_AXES: dict[str, tuple[str, ...]] = {
    "input_ids": ("rows", "positions"),
    "position_ids": ("rows", "positions"),
    "visual_index": ("rows", "visual tokens"),
    "text_index": ("rows", "text tokens"),
    "visual_count": ("slots", "groups"),
    "text_count": ("slots",),
    "visual_key": ("slots", "", "tiles"),
    "visual_key_params": ("slots", "", "groups"),
    "visual_value": ("slots", "", "tiles"),
    "visual_value_params": ("slots", "", "groups"),
    "text_key": ("slots", "", "text rows"),
    "text_value": ("slots", "", "text rows"),
}
"""What the axes of an input are, for messages."""


@dataclass(frozen=True)
class Buffer:
    """Device memory for one tensor. ``alias`` names the tensor whose memory it shares; its own bytes are then 0."""

    name: str
    dtype: str
    shape: Shape
    alias: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes that it adds."""
        return 0 if self.alias else tensor_bytes(self.dtype, self.shape)


def cache_buffers(engines: EngineManifest, cache: PackedCache) -> tuple[Buffer, ...]:
    """The memory that calls share, for inputs and outputs of the decoder: that of the caches and of new counts.

    An output that the engine updates in place shares the memory of its input. The counts before a call come with it,
    for all layers read them while the new ones are written.
    """
    tensors = cache.layout.tensors(cache.slots, cache.visual_capacity, cache.text_capacity)
    past = {f"past.{name}": tensor for name, tensor in tensors.items()}
    buffers = [Buffer(name, *spec) for name, spec in past.items()]
    buffers += [Buffer(f"{name}_out", "int32", getattr(cache, name).shape) for name in COUNTS]
    for present, source in engines.aliases.items():
        buffers.append(Buffer(present, *past[source], alias=source))
    return tuple(buffers)


def check_cache(engines: EngineManifest, buffers: Sequence[Buffer]) -> None:
    """Raise CapacityError if the engine does not take caches of these shapes."""
    for name in (PREFILL, DECODE):
        profile = engines.profile(DECODER, name)
        for buffer in buffers:
            if buffer.name in profile.shapes:
                _check(profile, buffer.name, buffer.shape)


@dataclass(frozen=True)
class CallPlan:
    """A call as an engine gets it: ``call`` padded to what ``profile`` takes, and the shapes of the inputs it brings.

    ``arrays`` are those of them that are integers, the counts before the call included; ``rows`` are those of the call
    before it was padded by idle ones.
    """

    profile: Profile
    call: Call
    rows: int
    arrays: dict[str, np.ndarray]
    shapes: dict[str, Shape]


def plan_call(engines: EngineManifest, call: Call, cache: PackedCache, embed_width: int) -> CallPlan:
    """Choose the profile of a call and pad the call to it.

    One new token per row and no picture is a decode step; its rows are padded to :func:`decode_rows`, so that there are
    few different steps to prepare. Raises CapacityError if the engine's limits do not suffice.
    """
    rows, group_size = len(call.slot), cache.group_size
    decoding = call.input_ids.shape[1] == 1 and not (call.visual_index >= 0).any()
    profile = engines.profile(DECODER, DECODE if decoding else PREFILL)
    least = {name: list(profile.shapes[name][0]) for name in call.inputs}
    if decoding:
        wanted = decode_rows(rows, min(cache.slots, profile.shapes["slot"][2][0]))
        for shape in least.values():
            shape[0] = max(shape[0], wanted)
        if not engines.empty_visual_index:
            least["visual_index"][1] = group_size
        call = replace(call, visual_index=call.visual_index[:, :0], visual_rows=call.visual_rows[:, :0])
    elif not engines.empty_visual_index:
        least["visual_index"][1] = max(group_size, least["visual_index"][1])
    # Rows of all inputs, and entries of both forms of the visual index, grow together.
    call = Call(
        **{name: _pad(array, least[name], PADDING.get(name, 0)) for name, array in call.inputs.items()},
        visual_rows=_pad(call.visual_rows, least["visual_index"], -1),
        next_position=_pad(call.next_position, least["slot"], 0),
    )
    arrays = {**call.inputs, **{name: getattr(cache, name) for name in COUNTS}}
    shapes: dict[str, Shape] = {name: array.shape for name, array in arrays.items()}
    for name, sizes in shapes.items():
        _check(profile, name, sizes)
    shapes["visual_embeds"] = (*call.visual_index.shape, embed_width)
    return CallPlan(profile, call, rows, arrays, shapes)


def pack(arrays: Mapping[str, Shape]) -> tuple[dict[str, int], int]:
    """Places in one buffer for INT32 arrays of these shapes: the offset of each, aligned, and the bytes of all."""
    offsets, end = {}, 0
    for name, shape in arrays.items():
        offsets[name] = end
        end += -(-4 * prod(shape) // ALIGNMENT) * ALIGNMENT
    return offsets, max(end, ALIGNMENT)


def embed_copies(call: Call, pieces: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """How to lay out picture embeddings as ``visual_embeds``, in runs of rows: (target, piece, source, rows).

    ``pieces`` are the rows of each part that the embeddings come in; ``target`` counts rows of [B * Nv].
    """
    rows = call.visual_rows.ravel()
    targets = np.flatnonzero(rows >= 0)
    if not len(targets):
        return
    sources = rows[targets]
    starts = np.concatenate([[0], np.cumsum(pieces)])
    owners = np.searchsorted(starts, sources, side="right") - 1
    broken = (np.diff(targets) != 1) | (np.diff(sources) != 1) | (np.diff(owners) != 0)
    firsts = np.concatenate([[0], np.flatnonzero(broken) + 1, [len(targets)]])
    for first, last in itertools.pairwise(firsts.tolist()):
        owner = owners[first]
        yield int(targets[first]), int(owner), int(sources[first] - starts[owner]), int(last - first)


def _pad(array: np.ndarray, least: Sequence[int], value: int) -> np.ndarray:
    growth = [(0, max(0, low - size)) for size, low in zip(array.shape, least, strict=True)]
    return np.pad(array, growth, constant_values=value) if any(after for _, after in growth) else array


def _check(profile: Profile, name: str, shape: Shape) -> None:
    if profile.takes(name, shape):
        return
    least, _, most = profile.shapes[name]
    axis = next(i for i, size in enumerate(shape) if not least[i] <= size <= most[i])
    labels = _AXES.get(name.rpartition(".")[2], ())
    label = (labels[axis] if axis < len(labels) else "") or f"size of axis {axis}"
    flag = "--max-slots" if (profile.name, label) == (DECODE, "rows") else _FLAGS.get(label)
    remedy = f" with {flag} {shape[axis]}" if flag and shape[axis] > most[axis] else ""
    raise CapacityError(
        f"the engine's {profile.name} profile takes {least[axis]} to {most[axis]} {label} ({name}), got {shape[axis]}; "
        f"run `vkvx build BUNDLE`{remedy} again, or ask for less"
    )
