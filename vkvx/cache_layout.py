"""What the cache of a model looks like: shapes, dtypes and bytes, from the model and its quantisation alone.

Standard library only. Symbols are those of ``docs/format.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from vkvx.format import BASELINE_BITS, CACHE_NAMES, STATE_NAMES, TILE, WORD_BITS, text_words

if TYPE_CHECKING:
    from vkvx.manifest import ModelInfo, Quantization

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4}
_KEY_PARAMS, _VALUE_PARAMS = 3, 2  # scale, offset, RMS of the residual; scale, offset

Size = TypeVar("Size", int, str)
"""A number, or the name of a dynamic dimension."""


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; ``dtype`` is a key of ``ITEM_BYTES``."""
    return ITEM_BYTES[dtype] * math.prod(shape)


@dataclass(frozen=True)
class CacheLayout:
    """The cache tensors of a model. Bytes count the keys and values of every layer.

    ``tokens`` are those of one picture, by default a usual one.
    """

    info: ModelInfo
    quantization: Quantization

    @property
    def is_packed(self) -> bool:
        """False at 16 bits, where visual tokens lie among the text rows."""
        return BASELINE_BITS not in self.quantization.key_bits

    def layer_tensors(
        self, layer: int, slots: Size, tiles: Size, groups: Size, rows: Size
    ) -> dict[str, tuple[str, tuple[Size | int, ...]]]:
        """Dtype name and shape of a layer's cache tensors: six by ``CACHE_NAMES``, or two by ``STATE_NAMES`` in a layer
        of linear attention. All else follows from these."""
        linear = self.info.layers[layer].linear
        if linear is not None:
            states: tuple[tuple[str, tuple[Size | int, ...]], ...] = (
                (self.info.dtype, (slots, linear.conv_channels, linear.conv_width)),
                ("float32", (slots, linear.heads, linear.key_dim, linear.value_dim)),
            )
            return dict(zip(STATE_NAMES, states, strict=True))
        heads, dim = self.info.layers[layer].kv_heads, self.info.layers[layer].head_dim
        number = self.info.caches.index(layer)
        # Where nothing is packed there are no tiles, but shapes still have an axis for the planes.
        key_planes, value_planes = (
            1 if bits[number] == BASELINE_BITS else bits[number]
            for bits in (self.quantization.key_bits, self.quantization.value_bits)
        )
        text: tuple[str, tuple[Size | int, ...]] = (self.info.dtype, (slots, heads, rows, dim))
        if self.quantization.text_bits != BASELINE_BITS:
            text = ("int32", (slots, heads, rows, text_words(dim)))
        tensors: tuple[tuple[str, tuple[Size | int, ...]], ...] = (
            ("int32", (slots, heads, tiles, key_planes, TILE, dim // WORD_BITS)),
            ("float16", (slots, heads, groups, _KEY_PARAMS, dim)),
            ("int32", (slots, heads, tiles, value_planes, dim, TILE // WORD_BITS)),
            ("float16", (slots, heads, groups, _VALUE_PARAMS, dim)),
            text,
            text,
        )
        return dict(zip(CACHE_NAMES, tensors, strict=True))

    def tensors(self, slots: int, visual_capacity: int, text_capacity: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype name and shape of each cache tensor, keyed ``"{layer}.visual_key"`` and so on.

        ``visual_capacity`` counts tokens: a multiple of the group size, and 0 if nothing is packed (ValueError).
        """
        size = self.quantization.group_size
        if visual_capacity % size or (visual_capacity and not self.is_packed):
            raise ValueError(f"visual capacity {visual_capacity} does not suit groups of {size}")
        sizes = (slots, visual_capacity // TILE, visual_capacity // size, text_capacity)
        return {
            f"{layer}.{name}": tensor
            for layer in self.stored_layers
            for name, tensor in self.layer_tensors(layer, *sizes).items()
        }

    @property
    def stored_layers(self) -> tuple[int, ...]:
        """The layers that have tensors in the cache: keys and values of their own, or a state."""
        return tuple(sorted((*self.info.caches, *self.info.linear_layers)))

    @cached_property
    def state_bytes(self) -> int:
        """Bytes that the states of linear attention take in a slot, however long its sequence is."""
        return sum(
            tensor_bytes(*tensor)
            for layer in self.info.linear_layers
            for tensor in self.layer_tensors(layer, 1, 0, 0, 0).values()
        )

    @cached_property
    def bytes_per_group(self) -> int:
        """Bytes of one group: words and params (0 if nothing is packed)."""
        return self._bytes(self.quantization.group_size, 0) if self.is_packed else 0

    @cached_property
    def text_bytes_per_token(self) -> int:
        """Bytes that one text token takes."""
        return self._bytes(0, 1)

    @property
    def elements_per_token(self) -> int:
        """Key and value elements of a token."""
        layers = (self.info.layers[i] for i in self.info.caches)
        return sum(2 * layer.kv_heads * layer.head_dim for layer in layers)

    def visual_bytes(self, lengths: Iterable[int]) -> int:
        """Bytes that pictures of these numbers of tokens take, with params and padding to groups."""
        if not self.is_packed:
            return sum(lengths) * self.text_bytes_per_token
        return sum(math.ceil(length / self.quantization.group_size) for length in lengths) * self.bytes_per_group

    def visual_bytes_per_picture(self, tokens: int | None = None) -> int:
        """Bytes that a picture takes."""
        return self.visual_bytes((self._picture_tokens(tokens),))

    def sixteen_bit_bytes_per_picture(self, tokens: int | None = None) -> int:
        """Bytes that the same picture takes at two bytes per element."""
        return 2 * self._picture_tokens(tokens) * self.elements_per_token

    def bits_per_element(self, tokens: int | None = None) -> float:
        """Bits for each key or value element of a picture, with params and padding to groups."""
        return 16 * self.visual_bytes_per_picture(tokens) / self.sixteen_bit_bytes_per_picture(tokens)

    def _bytes(self, visual_capacity: int, text_capacity: int) -> int:
        tensors = self.tensors(1, visual_capacity, text_capacity).values()
        return sum(tensor_bytes(*tensor) for tensor in tensors) - self.state_bytes

    def _picture_tokens(self, tokens: int | None) -> int:
        return tokens or self.info.usual_tokens
