"""Sequences that stay in their slots after they were served, and how much of one a new prompt may go on from.

A prompt gets what it gets in an empty slot, but for rounding: the tokens that it does not feed again lie in the cache
as its own calls would have left them. At 16 bits that holds for any tokens and pictures that are the same. Where
pictures are packed, a token depends on which of them came with its own call, exact, and which came before, as codes. So
the calls that brought the pictures before the place where it goes on must have ended at the same tokens, none of them
behind that place; with text of 8 bits that goes for all calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from vkvx.format import BASELINE_BITS
from vkvx.manifest import Manifest
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.sessions.pieces import Piece, spans
from vkvx.runtime.sessions.processor import Prepared

_LEAST = 16
"""Tokens that are worth a copy: fewer are fed as quickly."""


@dataclass(frozen=True)
class Picture:
    """Tokens ``start`` to ``end`` of a sequence, ``length`` of them visual, made of pixels of this SHA-256."""

    start: int
    end: int
    length: int
    digest: bytes


@dataclass(frozen=True)
class Fed:
    """What a sequence was or will be fed: INT32 tokens [n], pictures in order, and where calls of its prompt end.

    ``positions`` INT32 [3, n] are those of the rotary embedding in models where pictures have rows and columns.
    """

    token_ids: np.ndarray
    pictures: tuple[Picture, ...]
    ends: tuple[int, ...]
    positions: np.ndarray | None = None

    @classmethod
    def of_prompt(cls, prepared: Prepared, pieces: Sequence[Piece], manifest: Manifest) -> Fed | None:
        """A prompt and its calls; None if its pictures cannot be told from others."""
        if len(prepared.picture_digests) != len(prepared.picture_lengths):
            return None
        ids, model = prepared.token_ids, manifest.model
        places = spans(ids, prepared.picture_lengths, model.image_token_id)
        known = zip(places, prepared.picture_lengths, prepared.picture_digests, strict=True)
        positions = prepared.positions
        if positions is None and model.position_rows > 1:
            positions = np.arange(len(ids), dtype=np.int32)[None].repeat(3, axis=0)
        pictures = tuple(Picture(*place, length, digest) for place, length, digest in known)
        return cls(ids, pictures, tuple(piece.end for piece in pieces), positions)

    def grown(self, token_ids: Sequence[int]) -> Fed:
        """The same with all tokens of the sequence, of which those behind the prompt are text, or with fewer."""
        positions, more = self.positions, len(token_ids) - len(self.token_ids)
        if positions is not None and more > 0:
            new = positions.max() + 1 + np.arange(more, dtype=np.int32)
            positions = np.concatenate([positions, new[None].repeat(3, axis=0)], axis=1)
        return replace(self, token_ids=np.array(token_ids, np.int32), positions=positions).cut(len(token_ids))

    def cut(self, count: int) -> Fed:
        """The first ``count`` tokens, or as many as there are before the picture that would be cut."""
        count = self.before_picture(count)
        pictures = tuple(one for one in self.pictures if one.end <= count)
        positions = None if self.positions is None else self.positions[:, :count]
        return replace(self, token_ids=self.token_ids[:count], pictures=pictures, positions=positions)

    def before_picture(self, count: int) -> int:
        """``count``, or where the picture starts that holds this token and the one before it."""
        return next((one.start for one in self.pictures if one.start < count < one.end), count)

    def picture_ends(self, count: int, image_token_id: int) -> list[int]:
        """Ends of the calls that bring visual tokens among the first ``count``."""
        if not any(one.start < count for one in self.pictures):
            return []
        visual = np.flatnonzero(self.token_ids[:count] == image_token_id)
        return [self.ends[i] for i in np.unique(np.searchsorted(self.ends, visual, side="right"))]

    @property
    def next_position(self) -> int:
        """Of the rotary embedding."""
        return len(self.token_ids) if self.positions is None else int(self.positions.max(initial=-1)) + 1


def common(kept: Fed, new: Fed, manifest: Manifest) -> int:
    """How many tokens of ``new`` need not be fed where ``kept`` is in the cache; the last is fed always."""
    model = manifest.model
    masks = {layer.visual_mask for layer in model.layers}
    if "prefix" in masks:  # a prompt sees itself both ways
        return 0
    count = _same(kept, new)
    if manifest.quantization.text_bits != BASELINE_BITS:
        matching = takewhile(lambda pair: pair[0] == pair[1] <= count, zip(kept.ends, new.ends, strict=False))
        count = max((end for end, _ in matching if end == new.before_picture(end)), default=0)
    while count > 0 and not _sees_the_same(kept, new, count, manifest, both_ways="run" in masks):
        count = max((one.start for one in new.pictures if one.start < count), default=0)
    return 0 if model.linear_layers and count < len(kept.token_ids) else count


def _same(kept: Fed, new: Fed) -> int:
    """How many tokens, whole pictures and positions are the same, less than ``new`` has."""
    count = min(len(kept.token_ids), len(new.token_ids) - 1)
    differs = kept.token_ids[:count] != new.token_ids[:count]
    if kept.positions is not None and new.positions is not None:
        differs = differs | (kept.positions[:, :count] != new.positions[:, :count]).any(axis=0)
    count = int(differs.argmax()) if differs.any() else count
    pairs = zip(kept.pictures, new.pictures, strict=False)
    matching = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(kept.pictures), len(new.pictures)))
    others = (*kept.pictures[matching:], *new.pictures[matching:])
    return min([new.before_picture(count), *(one.start for one in others)])


def _sees_the_same(kept: Fed, new: Fed, count: int, manifest: Manifest, *, both_ways: bool) -> bool:
    """Whether the first ``count`` tokens have seen the same of pictures in both."""
    image = manifest.model.image_token_id
    neighbours = [int(one.token_ids[count]) for one in (kept, new) if len(one.token_ids) > count]
    if both_ways and new.token_ids[count - 1] == image and image in neighbours:  # which see each other
        return False
    if not manifest.layout.is_packed:
        return True
    ends = kept.picture_ends(count, image)
    return ends == new.picture_ends(count, image) and max(ends, default=0) <= count


class KeptSequences:
    """The sequences in slots that were given back, until these are needed; the least recently used goes first.

    ``hits`` counts prompts that went on from one, ``tokens`` those that they did not feed.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._fed: dict[int, Fed] = {}
        self.hits = 0
        self.tokens = 0

    def take(self, new: Fed) -> tuple[int, int]:
        """A slot for a prompt, and how many of its tokens are in it. Raises CapacityError if all are taken.

        A kept sequence of which the prompt needs a part only is copied, unless there is no other slot.
        """
        cache = self._backend.cache
        counts = {slot: common(self._fed[slot], new, self._backend.manifest) for slot in cache.kept_slots}
        slot = max(reversed(counts), key=counts.__getitem__, default=-1)  # the most recently used of the best
        count = counts.get(slot, 0)
        if count < _LEAST:
            return cache.acquire(), 0
        cache.resume(slot)
        if count < len(self._fed[slot].token_ids):
            if cache.free_slots:
                source, slot = slot, cache.acquire()
                cache.fork(source, slot)
                cache.keep(source)
            self._truncate(slot, new.cut(count))
        self.hits += 1
        self.tokens += count
        return slot, count

    def keep(self, slot: int, fed: Fed) -> None:
        """Give back a slot that holds the first tokens of a sequence, or more; they stay there if they are of use."""
        cache, length = self._backend.cache, self._backend.cache.length(slot)
        fed = fed.cut(min(length, len(fed.token_ids)))
        is_cut = len(fed.token_ids) < length
        if len(fed.token_ids) < _LEAST or (is_cut and self._backend.manifest.model.linear_layers):
            cache.release(slot)
            return
        if is_cut:
            self._truncate(slot, fed)
        self._fed[slot] = fed
        cache.keep(slot)

    def _truncate(self, slot: int, fed: Fed) -> None:
        lengths = [one.length for one in fed.pictures]
        self._backend.cache.truncate(slot, lengths, len(fed.token_ids) - sum(lengths), fed.next_position)
