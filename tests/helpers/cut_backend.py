"""A backend without a model whose tokens depend on all that a real model's depend on, calls included."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from fakes import IMAGE, FakeBackend

from vkvx.runtime.calls import Call


class CutBackend(FakeBackend):
    """Each token has a number, a hash of its id or pixel, its place, and of all numbers that it sees.

    It sees those of its own call as they are, and stored ones of earlier calls. Text is stored as it is, or coarser
    with text of 8 bits; pictures that are packed are stored coarser, by the last position of their call, as noise
    shaping does it. Pictures that see themselves both ways have a hash of the whole run of visual tokens besides.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        layers, quantization = self.manifest.model.layers, self.manifest.quantization
        self.both_ways = any(layer.visual_mask == "run" for layer in layers)
        self.coarse_text = quantization.text_bits == 8
        self.coarse_pictures = self.manifest.layout.is_packed
        self.fed = 0

    def views(self, call: Call, b: int, held: list[float], new: list[float]) -> tuple[list[float], list[float]]:
        self.fed += len(new)
        ids, positions = call.input_ids[b], call.position_ids[b].reshape(-1, call.input_ids.shape[1])
        own = [row.tobytes() for row in np.concatenate([[new], positions[:, : len(new)]]).astype(np.float64).T]
        if call.window_start is not None:
            self._check_windows(int(call.slot[b]), len(held), call.window_start[b, :, : len(new)])
        visual = (ids[: len(new)] == IMAGE).tolist()
        if self.both_ways:
            own = self._with_runs(own, visual)
        state = hashlib.sha256(np.array(held).tobytes())
        exact = list[float]()
        for one in own:
            number = state.copy()
            number.update(one)
            exact.append(int.from_bytes(number.digest()[:6], "little") + 1000.5)
            state.update(np.float64(exact[-1]).tobytes())
        end = len(held) + len(new)
        coarse = [self.coarse_pictures if is_visual else self.coarse_text for is_visual in visual]
        kinds = [end if is_visual else -1 for is_visual in visual]
        stored = [
            hash((number, kind)) % 2**48 + 0.25 if is_coarse else number
            for number, kind, is_coarse in zip(exact, kinds, coarse, strict=True)
        ]
        return held + exact, stored

    def _check_windows(self, slot: int, held: int, starts: np.ndarray) -> None:
        """Each token hides the cached ones that its window does not reach."""
        size, window = self.manifest.quantization.group_size, self.manifest.layout.info.sliding_window
        for at, (entry, row) in enumerate(starts.T.tolist()):
            counts = enumerate(self.cache.visual_count[slot].tolist())
            hidden = row + sum(min(count, max(0, entry - group * size)) for group, count in counts)
            assert hidden == min(held, max(0, held + at - window + 1))

    def _with_runs(self, own: list[bytes], visual: list[bool]) -> list[bytes]:
        found, start = list(own), 0
        while start < len(own):
            end = start + 1
            while visual[start] and end < len(own) and visual[end]:
                end += 1
            if visual[start]:
                run = hashlib.sha256(b"".join(own[start:end])).digest()
                found[start:end] = [one + run for one in own[start:end]]
            start = end
        return found
