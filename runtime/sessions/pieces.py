"""Where a prompt is cut into calls: between text tokens, where a group of visual tokens ends, and behind pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vkvx.errors import OptionError
from vkvx.manifest import Manifest
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Row

_OPTION = "prefill_chunk (--prefill-chunk)"


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``end`` of a prompt, for one call.

    ``picture_lengths`` are the visual tokens of each picture, or part of one, that it holds; ``first_embed`` is the row
    of its first visual token in the embeddings of all pictures of the prompt.
    """

    start: int
    end: int
    picture_lengths: tuple[int, ...] = ()
    first_embed: int = 0

    @property
    def last_embed(self) -> int:
        """The row behind that of its last visual token."""
        return self.first_embed + sum(self.picture_lengths)

    def __len__(self) -> int:
        return self.end - self.start

    def row(
        self,
        cache: PackedCache,
        slot: int,
        token_ids: np.ndarray,
        positions: np.ndarray | None,
        first_position: int,
        *,
        embeds: int,
    ) -> Row:
        """What the call of this piece feeds, of all tokens INT [n].

        ``positions`` INT [3, m] are those of the rotary embedding for the last m tokens, from ``first_position``, in
        models that have them; ``embeds`` is how many embeddings are given where the piece has pictures.
        """
        if positions is not None:
            before = len(token_ids) - positions.shape[1]
            positions = positions[:, max(0, self.start - before) : max(0, self.end - before)] + first_position
            # The cache counts on from the slot's next position, which a piece within a picture leaves anywhere.
            positions = positions - (int(cache.next_position[slot]) + len(self) - positions.shape[1])
        row = cache.row(slot, token_ids[self.start : self.end], self.picture_lengths, positions)
        others = (self.first_embed, embeds - self.last_embed) if self.picture_lengths else (0, 0)
        return replace(row, other_embeds=others)


def check_cut_after_pictures(manifest: Manifest, wanted: bool) -> None:
    """Raise OptionError unless prompts of this model can be cut behind their pictures."""
    if not wanted:
        return
    option, model = "cut_after_pictures (--cut-after-pictures)", manifest.model
    if not manifest.layout.is_packed:
        raise OptionError(f"{option} is for packed pictures; at 16 bits they are reused without, so leave it out")
    if any(layer.visual_mask == "prefix" for layer in model.layers):
        raise OptionError(f"{option} is not for {model.name}, whose prompts see themselves both ways; leave it out")


def check_prefill_chunk(manifest: Manifest, limit: int | None) -> None:
    """Raise OptionError unless prompts of this model can be cut into pieces of ``limit`` tokens (None: no cuts)."""
    if limit is None:
        return
    if limit < 1:
        raise OptionError(f"{_OPTION} must be at least 1, got {limit}")
    model, size = manifest.model, manifest.quantization.group_size
    masks = {layer.visual_mask for layer in model.layers}
    if "prefix" in masks:
        raise OptionError(f"{_OPTION} is not for {model.name}, whose prompts see themselves both ways; leave it out")
    if manifest.layout.is_packed and limit < size:
        raise OptionError(f"{_OPTION} must be at least {size}, the group size of the bundle, got {limit}")
    if "run" in masks and limit < model.usual_tokens:
        raise OptionError(
            f"{_OPTION} must be at least {model.usual_tokens}, the tokens of a picture, which see each other both "
            f"ways, got {limit}"
        )


def cut(
    token_ids: np.ndarray,
    picture_lengths: Sequence[int],
    manifest: Manifest,
    limit: int | None,
    after_pictures: bool = False,
) -> tuple[Piece, ...]:
    """The pieces of a prompt INT [n], each of at most ``limit`` tokens (None: it stays whole).

    With ``after_pictures`` a piece also ends behind the last picture of each turn, which an end-of-sequence token ends.

    A group of visual tokens stays whole with the text within it, and so do neighbouring visual tokens that see each
    other both ways: where such a part is longer than ``limit``, its piece is longer, too. Where a prompt is cut depends
    on the prompt alone.
    """
    count = len(token_ids)
    forced = _turns(token_ids, picture_lengths, manifest) if after_pictures else []
    if (limit is None or count <= limit) and not forced:
        return (Piece(0, count, tuple(picture_lengths)),)
    limit = count if limit is None else limit
    visual = np.flatnonzero(token_ids == manifest.model.image_token_id) if picture_lengths else np.empty(0, int)
    allowed = np.ones(count + 1, bool)
    ends = np.cumsum(picture_lengths, dtype=int)
    if manifest.layout.is_packed:
        for length, end in zip(picture_lengths, ends, strict=True):
            for first in range(end - length, end, manifest.quantization.group_size):
                last = min(first + manifest.quantization.group_size, end) - 1
                allowed[visual[first] + 1 : visual[last] + 1] = False
    if any(layer.visual_mask == "run" for layer in manifest.model.layers):
        allowed[visual[1:][np.diff(visual) == 1]] = False
    places = np.flatnonzero(allowed)
    bounds = [0]
    while bounds[-1] < count:
        last = next((place for place in forced if place > bounds[-1]), count)
        fitting = places[(places > bounds[-1]) & (places <= min(bounds[-1] + limit, last))]
        bounds.append(int(fitting[-1] if fitting.size else places[places > bounds[-1]][0]))
    # Visual tokens before each bound, and where pictures end among them.
    embeds = np.searchsorted(visual, bounds)
    pieces = []
    for start, end, first, last in zip(bounds, bounds[1:], embeds, embeds[1:], strict=False):
        inner = ends[(ends > first) & (ends < last)]
        lengths = np.diff(np.concatenate([[first], inner, [last]])) if last > first else ()
        pieces.append(Piece(start, end, tuple(int(length) for length in lengths), int(first)))
    return tuple(pieces)


def spans(token_ids: np.ndarray, picture_lengths: Sequence[int], image_token_id: int) -> list[tuple[int, int]]:
    """Where each picture of a prompt INT [n] starts, and the token behind it."""
    visual = np.flatnonzero(token_ids == image_token_id) if picture_lengths else np.empty(0, int)
    ends = np.cumsum(picture_lengths, dtype=int)
    lengths = zip(picture_lengths, ends, strict=True)
    return [(int(visual[end - length]), int(visual[end - 1]) + 1) for length, end in lengths]


def _turns(token_ids: np.ndarray, picture_lengths: Sequence[int], manifest: Manifest) -> list[int]:
    """Behind the last picture of each turn, ascending."""
    ends = [end for _, end in spans(token_ids, picture_lengths, manifest.model.image_token_id)]
    turns = np.searchsorted(np.flatnonzero(np.isin(token_ids, manifest.model.eos_token_ids)), ends)
    return [end for end, turn, following in zip(ends, turns, [*turns[1:], -1], strict=False) if turn != following]


def behind(pieces: Sequence[Piece], start: int, embeds: int, first_embed: int = 0) -> tuple[Piece, ...]:
    """What is left of pieces behind token ``start``, which is in no picture and has ``embeds`` visual tokens before it.

    ``first_embed`` is the first row of the pictures' embeddings that is given.
    """
    left = []
    for piece in pieces:
        if piece.end <= start:
            continue
        lengths, done = list(piece.picture_lengths), max(0, embeds - piece.first_embed)
        while done > 0:
            done -= lengths.pop(0)
        first = max(piece.first_embed, embeds) - first_embed
        left.append(Piece(max(start, piece.start), piece.end, tuple(lengths), first))
    return tuple(left)
