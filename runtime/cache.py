"""The packed cache: buffers for a number of sequences, and how full each of them is.

One row of every buffer is a *slot*; a slot holds one sequence. Visual tokens fill groups of ``group_size`` entries,
text tokens fill rows. Counts say what is valid; whatever lies at or past them is unspecified and is never read, so
resetting a slot means no more than setting its counts to zero. The states of linear attention hold all of a sequence in
one piece: counts above zero must not be lowered then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from vkvx.cache_layout import CacheLayout, tensor_bytes
from vkvx.errors import CapacityError
from vkvx.format import CACHE_NAMES, STATE_NAMES, TILE
from vkvx.runtime.calls import Call, Row, window_starts

Shape = tuple[int, ...]


class Storage(Protocol):
    """Where the buffers live. :class:`HostStorage` keeps them as NumPy arrays, a backend may keep them on a device."""

    def allocate(self, dtype: str, shape: Shape) -> Any:
        """A buffer with undefined contents."""

    def copy(self, buffer: Any, source: int, target: int, entries: int) -> None:
        """Copy the first ``entries`` of axis 2 from row ``source`` of axis 0 to row ``target``."""

    def read(self, buffer: Any, row: int | None = None) -> np.ndarray:
        """The contents, or one row of axis 0, as an array, without a copy where the buffer is in host memory."""

    def write(self, buffer: Any, contents: np.ndarray) -> None:
        """Replace the contents; the array has the buffer's shape and dtype."""


class HostStorage:
    """Buffers in main memory, as NumPy arrays."""

    def allocate(self, dtype: str, shape: Shape) -> np.ndarray:
        try:
            return np.zeros(shape, numpy_dtype(dtype))  # zeros come from the system lazily: unused rows take no memory
        except (MemoryError, ValueError) as error:  # ValueError: more bytes than there are addresses
            raise CapacityError(
                f"main memory has no room for a tensor of shape {list(shape)}; lower slots=, visual_tokens= "
                "(--max-visual-tokens) or text_tokens= (--max-text-tokens)"
            ) from error

    def copy(self, buffer: np.ndarray, source: int, target: int, entries: int) -> None:
        buffer[target, :, :entries] = buffer[source, :, :entries]

    def read(self, buffer: np.ndarray, row: int | None = None) -> np.ndarray:
        return buffer if row is None else buffer[row]

    def write(self, buffer: np.ndarray, contents: np.ndarray) -> None:
        buffer[...] = contents


class PackedCache:
    """Buffers of all layers for ``slots`` sequences, and their counts.

    ``visual_tokens`` and ``text_tokens`` are capacities a slot. The first is rounded up to whole groups and is at
    least one group. In a bundle of 16 bits visual tokens lie among the text rows: there the visual buffers are empty
    and the two capacities add up to text rows.

    ``buffers`` maps ``"{layer}.visual_key"`` and so on (shapes and dtypes: ``docs/format.md``) to what the storage
    allocates: NumPy arrays unless a backend keeps them on a device. ``visual_count`` is INT32 [slots, groups],
    ``text_count`` INT32 [slots]; both are always NumPy arrays.
    """

    def __init__(
        self, layout: CacheLayout, slots: int, visual_tokens: int, text_tokens: int, storage: Storage | None = None
    ) -> None:
        if slots < 1 or visual_tokens < 0 or text_tokens < 1:
            raise CapacityError(
                "a cache takes at least 1 slot, 0 visual tokens and 1 text token per slot, "
                f"got slots={slots}, visual_tokens={visual_tokens}, text_tokens={text_tokens}"
            )
        size = layout.quantization.group_size
        self.layout = layout
        self.slots = slots
        self.group_size = size
        if layout.is_packed:
            self.visual_capacity, self.text_capacity = max(1, -(-visual_tokens // size)) * size, text_tokens
        else:
            self.visual_capacity, self.text_capacity = 0, visual_tokens + text_tokens
        self.groups = self.visual_capacity // size
        self._storage: Storage = HostStorage() if storage is None else storage
        tensors = layout.tensors(slots, self.visual_capacity, self.text_capacity)
        self.buffers: dict[str, Any] = {name: self._storage.allocate(*tensor) for name, tensor in tensors.items()}
        # States of linear attention are copied as a whole, all of axis 2.
        states = [f"{layer}.{name}" for layer in layout.info.linear_layers for name in STATE_NAMES]
        self._state_entries = {name: tensors[name][1][2] for name in states}
        self.visual_count = np.zeros((slots, self.groups), np.int32)
        self.text_count = np.zeros(slots, np.int32)
        self.next_position = np.zeros(slots, np.int32)  # of the rotary embedding
        self._inline_visual = np.zeros(slots, np.int32)  # visual tokens among the text rows (16 bits)
        # Positions of what is cached, for sliding windows; padding of a group has that of the group's last token.
        entries, rows = (self.visual_capacity, self.text_capacity) if layout.info.sliding_window else (0, 0)
        self._visual_position = np.zeros((slots, entries), np.int32)
        self._text_position = np.zeros((slots, rows), np.int32)
        self._used: set[int] = set()
        self._kept: dict[int, None] = {}  # free, but not emptied; those that were given back longest ago come first
        counts = self.visual_count.nbytes + self.text_count.nbytes
        self._bytes = counts + sum(tensor_bytes(*tensor) for tensor in tensors.values())

    # Slots

    @property
    def free_slots(self) -> tuple[int, ...]:
        """Slots that may be acquired, ascending; what :meth:`keep` left in some of them is dropped then."""
        return tuple(slot for slot in range(self.slots) if slot not in self._used)

    @property
    def kept_slots(self) -> tuple[int, ...]:
        """Free slots that :meth:`keep` left as they were, those that were given back longest ago first."""
        return tuple(self._kept)

    def acquire(self) -> int:
        """Take the lowest free slot, one that is kept only if there is no other, and empty it.

        Of those that are kept the one goes that was given back longest ago. Raises CapacityError if all are taken.
        """
        free = self.free_slots
        if not free:
            raise CapacityError(
                f"all {self.slots} slots of the cache are in use; close a conversation or load the bundle with more "
                "slots (slots=)"
            )
        slot = next((slot for slot in free if slot not in self._kept), None)
        slot = self.resume(next(iter(self._kept)) if slot is None else slot)
        self.reset(slot)
        return slot

    def resume(self, slot: int) -> int:
        """Take a free slot with what is in it."""
        self._kept.pop(slot, None)
        self._used.add(slot)
        return slot

    def keep(self, slot: int) -> None:
        """Give a slot back, but leave what is in it until the slot is needed."""
        self._used.discard(slot)
        self._kept[slot] = None

    def release(self, slot: int) -> None:
        """Give a slot back and empty it."""
        self._used.discard(slot)
        self.reset(slot)

    def reset(self, slot: int) -> None:
        """Empty a slot. Only the counts change."""
        for counts in self._counts:
            counts[slot] = 0

    def fork(self, source: int, target: int) -> None:
        """Make slot ``target`` hold the same sequence as ``source``; only what is valid is copied."""
        groups, rows = self.group_count(source), int(self.text_count[source])
        tiles = groups * (self.group_size // TILE)
        entries = dict(zip(CACHE_NAMES, (tiles, groups, tiles, groups, rows, rows), strict=True))
        for name, buffer in self.buffers.items():
            used = entries.get(name.partition(".")[2], self._state_entries.get(name, 0))
            if used:
                self._storage.copy(buffer, source, target, used)
        self.rewind(target, self.mark(source))
        self._visual_position[target] = self._visual_position[source]
        self._text_position[target] = self._text_position[source]

    def mark(self, slot: int) -> tuple[np.ndarray, ...]:
        """How full a slot is, for :meth:`rewind`."""
        return tuple(np.copy(counts[slot]) for counts in self._counts)

    def rewind(self, slot: int, mark: tuple[np.ndarray, ...]) -> None:
        """Forget what came into a slot after its :meth:`mark`; states of linear attention only know the empty slot."""
        for counts, before in zip(self._counts, mark, strict=True):
            counts[slot] = before

    @property
    def _counts(self) -> tuple[np.ndarray, ...]:
        return self.visual_count, self.text_count, self.next_position, self._inline_visual

    def row(
        self,
        slot: int,
        token_ids: np.ndarray,
        picture_lengths: tuple[int, ...] = (),
        prompt_positions: np.ndarray | None = None,
    ) -> Row:
        """What a sequence feeds next: INT tokens [n] behind what the slot holds.

        ``prompt_positions`` INT [3, m] are those of the rotary embedding for the last m tokens, from 0, where these
        hold pictures of a model with ``position_rows`` of 4.
        """
        rotary = None
        if self.layout.info.position_rows > 1:
            start, count = int(self.next_position[slot]), len(token_ids)
            rotary = np.arange(start, start + count)[None].repeat(3, axis=0)
            if prompt_positions is not None:
                before = count - prompt_positions.shape[1]
                rotary[:, before:] = prompt_positions + (start + before)
        return Row(
            slot, token_ids, picture_lengths, self.length(slot), rotary, self._window_start(slot, len(token_ids))
        )

    def _window_start(self, slot: int, tokens: int) -> np.ndarray | None:
        """Where the windows of the next tokens start in a slot, INT32 [2, n]; None in models without windows."""
        window = self.layout.info.sliding_window
        if not window:
            return None
        visual = self._visual_position[slot, : self.group_count(slot) * self.group_size]
        text = self._text_position[slot, : self.text_count[slot]]
        length = self.length(slot)
        return window_starts(np.arange(length, length + tokens), window, visual, text)

    # Lengths

    def group_count(self, slot: int) -> int:
        """Groups that hold tokens."""
        return int(np.count_nonzero(self.visual_count[slot]))

    def visual_tokens(self, slot: int) -> int:
        """Visual tokens in the slot, without padding."""
        return int(self.visual_count[slot].sum()) + int(self._inline_visual[slot])

    def text_tokens(self, slot: int) -> int:
        """Text tokens in the slot."""
        return int(self.text_count[slot]) - int(self._inline_visual[slot])

    def length(self, slot: int) -> int:
        """All tokens in the slot; the next token takes this position."""
        return int(self.visual_count[slot].sum()) + int(self.text_count[slot])

    @property
    def visual_room(self) -> int:
        """Most visual tokens that a slot can hold, of pictures that fill their groups."""
        return self.visual_capacity if self.layout.is_packed else self.text_capacity

    def demand(self, picture_lengths: Sequence[int], text_tokens: int) -> tuple[int, int]:
        """Groups and text rows that pictures of these lengths and so many text tokens take."""
        if self.layout.is_packed:
            return sum(-(-length // self.group_size) for length in picture_lengths), text_tokens
        return 0, text_tokens + sum(picture_lengths)

    def check_capacity(self, slot: int | None, groups: int, text_tokens: int) -> None:
        """Raise CapacityError unless so many more groups and text rows fit into the slot (None: an empty one)."""
        used = 0 if slot is None else self.group_count(slot)
        if used + groups > self.groups:
            size = self.group_size
            raise CapacityError(
                f"the pictures need {groups} groups of {size} visual tokens, the cache has {self.groups - used} of "
                f"{self.groups} free; raise visual_tokens= (--max-visual-tokens) to at least {(used + groups) * size}"
            )
        used = 0 if slot is None else int(self.text_count[slot])
        if used + text_tokens > self.text_capacity:
            kind = "text tokens" if self.layout.is_packed else "tokens (at 16 bits pictures count as text)"
            short = used + text_tokens - self.text_capacity
            raise CapacityError(
                f"prompt and answer need room for {text_tokens} {kind}, the cache has {self.text_capacity - used} of "
                f"{self.text_capacity} free; raise text_tokens= (--max-text-tokens) by at least {short} "
                "or lower max_new_tokens= (--max-new-tokens)"
            )

    def commit(self, call: Call, visual_count: np.ndarray, text_count: np.ndarray) -> None:
        """Take over the counts [slots, groups] and [slots] that a call returned."""
        if self.layout.info.sliding_window:
            self._note_positions(call)
        self.visual_count[...] = visual_count
        self.text_count[...] = text_count
        live = call.slot >= 0
        slots = call.slot[live]
        self.next_position[slots] = call.next_position[live]
        if not self.layout.is_packed:  # visual tokens lie among the text rows
            self._inline_visual[slots] += np.count_nonzero(call.visual_index[live] >= 0, axis=1).astype(np.int32)

    def counts_after(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        """The counts [slots, groups] and [slots] that a call will return, which fits: the rules of the operator."""
        visual_count, text_count = self.visual_count.copy(), self.text_count.copy()
        groups = (call.visual_index >= 0).reshape(len(call.slot), -1, self.group_size).sum(axis=2)
        texts = (call.text_index >= 0).sum(axis=1)
        live = np.flatnonzero(call.slot >= 0)
        slots = call.slot[live]
        text_count[slots] += texts[live].astype(np.int32)
        if not self.layout.is_packed:
            text_count[slots] += groups[live].sum(axis=1, dtype=np.int32)
            return visual_count, text_count
        for b in live[groups[live].any(axis=1)]:
            slot = call.slot[b]
            new = groups[b][groups[b] > 0]
            first = self.group_count(slot)
            visual_count[slot, first : first + len(new)] = new
        return visual_count, text_count

    def retract(self, slot: int, text_tokens: int) -> None:
        """Forget the text tokens that a slot was given last."""
        self.text_count[slot] -= text_tokens
        self.next_position[slot] -= text_tokens

    def truncate(self, slot: int, picture_lengths: Sequence[int], text_tokens: int, next_position: int) -> None:
        """Forget all but the first tokens of a slot: pictures of these visual tokens, and so many text tokens.

        ``next_position`` is that of the rotary embedding. States of linear attention cannot do that.
        """
        groups, rows = self.demand(picture_lengths, text_tokens)
        self.visual_count[slot, groups:] = 0
        self.text_count[slot] = rows
        self.next_position[slot] = next_position
        self._inline_visual[slot] = 0 if self.layout.is_packed else sum(picture_lengths)

    def _note_positions(self, call: Call) -> None:
        """Remember the positions of a call's tokens where the call stores them; the counts are those before it."""
        for b, slot in enumerate(call.slot):
            if slot < 0:
                continue
            start, row = self.length(slot), int(self.text_count[slot])
            visual, text = call.visual_index[b], call.text_index[b]
            if self.layout.is_packed:
                filled = np.maximum.accumulate(visual)[
                    : np.count_nonzero(visual.reshape(-1, self.group_size)[:, 0] >= 0) * self.group_size
                ]
                entry = self.group_count(slot) * self.group_size
                self._visual_position[slot, entry : entry + len(filled)] = start + filled
            else:
                text = np.sort(np.concatenate([visual, text]))
            text = text[text >= 0]
            self._text_position[slot, row : row + len(text)] = start + text

    # Bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all buffers and counts."""
        return self._bytes

    def visual_bytes_used(self, slot: int) -> int:
        """Bytes of the slot that hold visual tokens: words and params of all layers, padding of groups included."""
        inline = int(self._inline_visual[slot]) * self.layout.text_bytes_per_token
        return self.group_count(slot) * self.layout.bytes_per_group + inline

    def bytes_used(self, slot: int) -> int:
        """Bytes of the slot that hold tokens of either kind, all layers, and states of linear attention."""
        text = self.text_tokens(slot) * self.layout.text_bytes_per_token
        return self.visual_bytes_used(slot) + text + (self.layout.state_bytes if self.length(slot) else 0)

    def read(self, name: str, slot: int | None = None) -> np.ndarray:
        """One buffer, or what it has of a slot, as an array: a view where it is in host memory, else a copy."""
        return self._storage.read(self.buffers[name], slot)

    def load(self, other: PackedCache) -> None:
        """Take over the contents of another cache of the same capacities; text rows are converted to this one's dtype.

        Raises CapacityError if the shapes differ.
        """
        for name, buffer in self.buffers.items():
            contents, own = other.read(name), self.read(name)
            if contents.shape != own.shape:
                raise CapacityError(f"{name} of a cache has shape {contents.shape}, expected {own.shape}")
            self._storage.write(buffer, contents.astype(own.dtype))
        for name in (
            "visual_count",
            "text_count",
            "next_position",
            "_inline_visual",
            "_visual_position",
            "_text_position",
        ):
            getattr(self, name)[...] = getattr(other, name)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a dtype name in a manifest; ``bfloat16`` comes from the package ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
