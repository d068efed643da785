"""The packed visual cache as a transformers ``Cache``: real words in torch tensors, updated in place by the operator.

The layers of the model call :class:`CacheCall` in place of the model's attention; the cache's ``update`` passes keys
and values through. Shapes and symbols are those of ``docs/format.md``; row b of a batch is slot b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicLayer
from transformers.cache_utils import LinearAttentionLayer

from vkvx.cache_layout import CacheLayout
from vkvx.errors import InputError, ModelError, OptionError
from vkvx.format import TILE
from vkvx.models.graph.decoder import cache_of
from vkvx.models.graph.metric import Metrics
from vkvx.plugins import torch_op  # noqa: F401 (registers the operator)
from vkvx.plugins.operator import METRIC_INPUTS, model_attributes
from vkvx.runtime.calls import window_starts

PADDING, TEXT, VISUAL, PICTURE = range(4)
"""Kinds of positions; ``PICTURE`` is the first visual token of a picture, ``VISUAL`` any other."""
MIN_SPARE_ROWS = 64


class PackedVisualCache(Cache):
    """Keys and values of a batch of sequences, those of pictures packed; give it as ``past_key_values``.

    Buffers are allocated by the first call, on the device of each layer, for its number of rows. They grow when a call
    needs more: visual groups to exactly what is needed, text rows by a quarter more (at least 64), so that decoding
    seldom copies. All rows have the capacity of the fullest one. ``metrics`` are the model's, if the quantiser needs
    them. Layers of linear attention keep their states as transformers' own caches do, in ``layers``.
    """

    def __init__(self, layout: CacheLayout, metrics: Metrics | None = None) -> None:
        super().__init__(layers=[])
        self.layout = layout
        self.metrics = metrics
        self.attributes = dict(zip(layout.info.attention_layers, model_attributes(layout), strict=True))
        self.cache_of = cache_of(layout.info.layers)
        self._running: CacheCall | None = None
        self._clear(0)

    def _clear(self, rows: int) -> None:
        self._kinds = torch.zeros(rows, 0, dtype=torch.uint8)  # of every position fed so far
        self._visual_count = torch.zeros(rows, 0, dtype=torch.int32)  # [B, G]
        self._text_count = torch.zeros(rows, dtype=torch.int32)
        self._next_position = torch.zeros(rows, dtype=torch.int64)  # of the rotary embedding
        self._text_capacity = 0
        self._buffers: list[dict[str, Tensor]] = [{} for _ in self.layout.info.caches]
        self._is_broken = False
        if linear := self.layout.info.linear_layers:
            # transformers finds a state by the number of its layer; layers of attention stay empty there.
            self.layers = [LinearAttentionLayer() if i in linear else DynamicLayer() for i in range(len(self))]

    # What a forward call of the model does

    def begin(self, kinds: Tensor, positions: Tensor | None = None) -> CacheCall:
        """Prepare a forward call that feeds tokens of these kinds, UINT8 [B, S] on the CPU; makes room for them.

        ``positions``, [B or 1, S], are those of the rotary embedding, or [4, B, S]: the plain index, time, row and
        column; without them each row counts its own tokens.

        Raises InputError for another number of rows than the cache has, visual tokens without a first one, or a cache
        with states that a failed call has changed.
        """
        if self._is_broken:
            raise InputError("a call failed and has changed states of linear attention; reset() and feed all again")
        if not self.get_seq_length():
            self._clear(len(kinds))
        elif len(kinds) != len(self._kinds):
            raise InputError(f"the cache holds {len(self._kinds)} rows, the call has {len(kinds)}; give as many")
        if positions is None:
            positions = self.positions(kinds)
        rotary = positions.cpu() if positions.dim() == 2 else positions[1:].cpu().amax(0)
        last = rotary.expand(len(kinds), -1).masked_fill(kinds == PADDING, 0).amax(1)
        call = self._new_call(kinds, last)
        call.positions = positions
        missing = call.visual_count.shape[1] - self._visual_count.shape[1]
        self._visual_count = pad(self._visual_count, (0, missing))
        needed = int(call.text_count.max())
        if needed > self._text_capacity:
            self._text_capacity = needed + max(MIN_SPARE_ROWS, needed // 4)
        self._running = call
        return call

    def _new_call(self, kinds: Tensor, last: Tensor) -> CacheCall:
        return CacheCall(self, kinds, last)

    def positions(self, kinds: Tensor) -> Tensor:
        """Positions INT64 [B, S] of new tokens if every row counts its own: padding does not shift what follows."""
        valid = kinds != PADDING
        known = self.mask.sum(1, keepdim=True) if self.get_seq_length() else 0
        return (valid.cumsum(1) - 1 + known).clamp(min=0)

    def next_position(self, row: int) -> int:
        """Position of the rotary embedding for the row's next token."""
        return int(self._next_position[row]) if self.is_initialized else 0

    def finish(self, call: CacheCall, *, succeeded: bool) -> None:
        """End a forward call; its tokens are in the cache if it succeeded, otherwise the cache is as before it.

        Raises ModelError if a layer did not use the cache.
        """
        self._running = None
        if not succeeded:
            self._is_broken = bool(self._states())
            return
        if call.layers_done != set(self.attributes):
            raise ModelError(
                "not every layer used the packed cache; leave the attention implementation alone until remove()"
            )
        self._kinds = torch.cat([self._kinds, call.kinds], 1)
        self._visual_count, self._text_count = call.visual_count, call.text_count
        fed = (call.kinds != PADDING).any(1)
        self._next_position = torch.where(fed, call.last + 1, self._next_position)

    def buffers(self, number: int, key: Tensor) -> dict[str, Tensor]:
        """The tensors of an attention cache, in the order of the operator's outputs, with room for the running call.

        Text rows of 16 bits take the dtype of ``key``; what lies at or past the counts is unspecified.
        """
        groups = self._visual_count.shape[1]
        tiles = groups * self.layout.quantization.group_size // TILE
        old, layer = self._buffers[number], self.layout.info.caches[number]
        specs = self.layout.layer_tensors(layer, len(self._visual_count), tiles, groups, self._text_capacity)
        grown: dict[str, Tensor] = {}
        for name, (kind, shape) in specs.items():
            is_kept = name.startswith("text") and self.attributes[layer].keeps_text
            dtype = key.dtype if is_kept else getattr(torch, kind)
            tensor = old.get(name)
            if tensor is None or tensor.shape != shape or tensor.device != key.device:
                with torch.inference_mode(False):  # may be used outside of that mode later
                    tensor = torch.zeros(shape, dtype=dtype, device=key.device)
                if name in old:
                    tensor[:, :, : old[name].shape[2]] = old[name]
            grown[name] = tensor
        self._buffers[number] = grown
        return grown

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Pass the call's keys and values through; the attention function stores them.

        Raises ModelError outside of a model that :func:`vkvx.quantize_visual_cache` has prepared.
        """
        if self._running is None:
            raise ModelError("the model does not use the packed cache; call quantize_visual_cache(model) first")
        return key_states, value_states

    # Lengths and bytes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions fed so far, padding included: the length that the attention mask has had."""
        return self._kinds.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit but memory."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a mask over all positions."""
        return self.get_seq_length() + query_length, 0

    @property
    def mask(self) -> Tensor:
        """BOOL [B, positions], on the CPU: which positions fed so far were no padding."""
        return self._kinds != PADDING

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens of each row."""
        return (self._kinds >= VISUAL).sum(1).tolist()

    @property
    def text_tokens(self) -> list[int]:
        """Text tokens of each row."""
        return (self._kinds == TEXT).sum(1).tolist()

    @property
    def visual_bytes(self) -> int:
        """Bytes that hold visual tokens, all rows and layers: words and params, padding of groups included."""
        if self.layout.is_packed:
            return int((self._visual_count > 0).sum()) * self._bytes_per_entry("visual", self._visual_count.shape[1])
        return sum(self.visual_tokens) * self._bytes_per_entry("text", self._text_capacity)

    @property
    def text_bytes(self) -> int:
        """Bytes that hold text tokens, all rows and layers."""
        return sum(self.text_tokens) * self._bytes_per_entry("text", self._text_capacity)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all buffers and states, what is there for growth and for shorter rows included."""
        states = sum(tensor.nbytes for layer in self._states() for tensor in layer)
        return sum(tensor.nbytes for layer in self._buffers for tensor in layer.values()) + states

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first call."""
        return len(self._kinds) if self.is_initialized else -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been fed."""
        return self.get_seq_length() > 0

    def _bytes_per_entry(self, kind: str, capacity: int) -> int:
        entries = max(1, len(self._kinds) * capacity)
        tensors = [buffer for layer in self._buffers for name, buffer in layer.items() if name.startswith(kind)]
        return sum(tensor.nbytes for tensor in tensors) // entries

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.layout.info.layers)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} layers, {len(self._kinds)} rows of {self.get_seq_length()} positions, "
            f"{self.visual_bytes} visual and {self.text_bytes} text bytes)"
        )

    # Changes between calls

    def reset(self) -> None:
        """Forget everything and free the buffers."""
        self._clear(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last positions of all rows; as in transformers the number is negative or 0.

        Raises OptionError for a positive number, more positions than there are, packed visual tokens among them, and
        models with linear attention, whose states hold all of a sequence in one piece.
        """
        removed = -tokens_to_remove
        if not 0 <= removed <= self.get_seq_length():
            raise OptionError(
                f"crop({tokens_to_remove}) is not possible with {self.get_seq_length()} positions; "
                "give the number to remove, as a negative one"
            )
        if removed and self.layout.info.linear_layers:
            raise OptionError("crop cannot take back tokens of a model with linear attention; reset() and feed again")
        self._take_back(removed)

    def rewind(self, removed: int, states: Sequence[Sequence[Tensor]]) -> None:
        """Take back the last ``removed`` positions of all rows, with what :meth:`states` gave before these."""
        self._take_back(removed)
        self.set_states(states)

    def states(self) -> list[list[Tensor]]:
        """Copies of the states of each layer of linear attention, once there are any."""
        return [[tensor.clone() for tensor in layer] for layer in self._states()]

    def set_states(self, states: Sequence[Sequence[Tensor]]) -> None:
        """Put back what :meth:`states` gave."""
        for i, (conv_state, recurrent_state) in zip(self.layout.info.linear_layers, states, strict=True):
            layer = self.layers[i]
            layer.reset()
            layer.update_conv_state(conv_state)
            layer.update_recurrent_state(recurrent_state)

    def _states(self) -> list[list[Tensor]]:
        layers = [self.layers[i] for i in self.layout.info.linear_layers]
        return [[layer.conv_states[0], layer.recurrent_states[0]] for layer in layers if layer.has_previous_state[0]]

    def _take_back(self, removed: int) -> None:
        kept = self.get_seq_length() - removed
        kinds = self._kinds[:, kept:]
        if self.layout.is_packed and (kinds >= VISUAL).any():
            raise OptionError("crop cannot take back pictures, which are packed; reset() and feed the rest again")
        if self.layout.info.position_rows > 1 and (kinds >= VISUAL).any():
            raise OptionError("crop cannot take back pictures of this model; reset() and feed the rest again")
        self._kinds = self._kinds[:, :kept]
        self._next_position = self._next_position - (kinds != PADDING).sum(1)
        self._text_count = self._text_count - (kinds != PADDING).sum(1, dtype=torch.int32)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i hold what row ``beam_idx[i]`` holds; INT64 [rows to be]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.batch_select_indices(torch.arange(len(self._kinds)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, INT64 [rows to be], in this order; a row may come several times."""
        if not self.is_initialized:
            return
        rows = indices.cpu()
        self._kinds, self._visual_count = self._kinds[rows], self._visual_count[rows]
        self._text_count, self._next_position = self._text_count[rows], self._next_position[rows]
        self._buffers = [
            {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in layer.items()}
            for layer in self._buffers
        ]
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.reorder_cache(rows)


class CacheCall:
    """One forward call over a cache: the operator's indices, and the counts that follow from them.

    ``kinds`` is UINT8 [B, S]; the counts INT32 [B, groups needed] and [B] are those after the call, on the CPU.
    """

    def __init__(self, cache: PackedVisualCache, kinds: Tensor, last: Tensor) -> None:
        """``last``, [B], is the position of each row's last token."""
        layout = cache.layout
        self.last = last
        self.positions: Tensor | None = None
        """Those of the rotary embedding that the call was begun with."""
        self.attributes = cache.attributes
        self.kinds = kinds
        self.layers_done: set[int] = set()
        self.cache = cache
        size = layout.quantization.group_size
        self.text_index = _positions(kinds == TEXT)
        self.visual_index = _picture_groups(kinds, size)
        before, self.visual_count = cache._visual_count, cache._visual_count
        if layout.is_packed:
            self.text_count = cache._text_count + (kinds == TEXT).sum(1, dtype=torch.int32)
            added = (
                (self.visual_index >= 0).unflatten(1, (-1, size)).sum(2)
                if self.visual_index.shape[1]
                else before[:, :0]
            )
            lists = [
                [*filter(None, old), *filter(None, new)]
                for old, new in zip(before.tolist(), added.tolist(), strict=True)
            ]
            width = max(before.shape[1], *(len(counts) for counts in lists))
            filled = [counts + [0] * (width - len(counts)) for counts in lists]
            self.visual_count = torch.tensor(filled, dtype=torch.int32).reshape(len(kinds), width)
        else:
            self.text_count = cache._text_count + (kinds != PADDING).sum(1, dtype=torch.int32)
        self._on_device: dict[torch.device, tuple[Tensor, ...]] = {}
        self._rotations: dict[torch.device, dict[int, Tensor]] = {}
        self._window_starts: dict[torch.device, Tensor] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a layer and storage of its new tokens: query [B, Hq, S, D], key, value [B, Hkv, S, D]."""
        own = self.cache.cache_of[layer]
        tensors = tuple(self.cache.buffers(own, key).values())
        visual_index, text_index, slot, visual_count, text_count = self._inputs(key.device)
        output = torch.ops.vkvx.visual_kv_attention_(
            *(query, key, value, visual_index, text_index, slot),
            *(*tensors[:4], visual_count, *tensors[4:], text_count),
            *(self._metrics(layer, key.device) or (None,) * len(METRIC_INPUTS)),
            self._window_start(key.device) if self.attributes[layer].sliding_window else None,
            **self.attributes[layer].to_dict(),
        )
        self.layers_done.add(layer)
        return output

    def _metrics(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """The operator's further inputs if the quantiser needs metrics."""
        metrics = self.cache.metrics
        if metrics is None:
            return ()
        if device not in self._rotations:
            self._rotations[device] = metrics.rotations(self.last.to(device))
        own = self.cache.cache_of[layer]
        return metrics.key[own], metrics.value[own], self._rotations[device][layer]

    def _window_start(self, device: torch.device) -> Tensor:
        """Where windows start, INT32 [B, 2, S]. Positions are those of tokens: padding does not count."""
        if device not in self._window_starts:
            layout, cached = self.cache.layout, self.cache._kinds
            new = self.cache.positions(self.kinds).numpy()
            known = (self.cache.mask.cumsum(1) - 1).numpy()
            stored = (cached == TEXT) if layout.is_packed else (cached != PADDING)
            entries = _picture_groups(cached, layout.quantization.group_size).numpy() if layout.is_packed else None
            starts = []
            for row, positions in enumerate(new):
                visual = positions[:0] if entries is None else np.maximum.accumulate(entries[row])
                visual = known[row][visual] if len(visual) else visual
                text = known[row][stored[row].numpy()]
                starts.append(window_starts(positions, layout.info.sliding_window, visual, text))
            self._window_starts[device] = torch.from_numpy(np.stack(starts)).to(device)
        return self._window_starts[device]

    def _inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Indices, slots and the counts before the call, on a layer's device."""
        if device not in self._on_device:
            slot = torch.arange(len(self.kinds), dtype=torch.int32)
            counts = self.cache._visual_count, self.cache._text_count
            tensors = (self.visual_index, self.text_index, slot, *counts)
            self._on_device[device] = tuple(tensor.to(device) for tensor in tensors)
        return self._on_device[device]


def _picture_groups(kinds: Tensor, size: int) -> Tensor:
    """Positions of the visual tokens in UINT8 [B, S]: INT32 [B, Nv], each picture filled up to whole groups with -1."""
    rows = []
    for row in kinds.numpy():
        visual = np.flatnonzero(row >= VISUAL)
        starts = np.flatnonzero(row[visual] == PICTURE)
        if len(visual) and (not len(starts) or starts[0]):
            raise InputError("a call goes on with a picture of the call before; give each picture in one call")
        pictures = np.split(visual, starts)[1:]
        filled = [np.pad(picture, (0, -len(picture) % size), constant_values=-1) for picture in pictures]
        rows.append(np.concatenate(filled) if filled else visual)
    width = max(map(len, rows))
    return torch.from_numpy(np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])).int()


def _positions(chosen: Tensor) -> Tensor:
    """Ascending positions of what is True in BOOL [B, S]: INT32 [B, most in a row], -1 at the end of other rows."""
    count = chosen.sum(1, keepdim=True)
    order = (~chosen).to(torch.uint8).sort(dim=1, stable=True).indices[:, : int(count.max())]
    return torch.where(torch.arange(order.shape[1]) < count, order, -1).int()
