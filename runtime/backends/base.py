"""What a backend does for a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vkvx.manifest import Manifest
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Call
from vkvx.runtime.engines.manifest import Limits

PROVIDERS = ("auto", "cpu", "cuda")


class Backend(Protocol):
    """Runs the model of one bundle over one cache. ``provider`` is where: "cpu" or "cuda"."""

    name: str
    provider: str
    manifest: Manifest
    cache: PackedCache

    @property
    def limits(self) -> Limits | None:
        """The most that a call may bring, None where only memory limits it."""

    def encode(self, pixel_inputs: Mapping[str, np.ndarray]) -> Any:
        """Embeddings [tokens of all pictures, hidden] of pictures, from what the image processor returns.

        A NumPy array, or one on a device that ``np.asarray`` copies to main memory.
        """

    def place(self, call: Call, embeds: Sequence[Any]) -> Any:
        """``visual_embeds`` [B, Nv, hidden] of a call, from what :meth:`encode` gave for its pictures, in order.

        It is good for the next :meth:`step` only.
        """

    def step(self, call: Call, visual_embeds: Any | None) -> np.ndarray:
        """Run the decoder once: logits FP32 [B, V] at each row's last token.

        ``visual_embeds`` [B, Nv, hidden] comes from :meth:`place` or :func:`vkvx.runtime.calls.place_embeds`; None if
        no row has a picture. Caches and counts of the call's slots are updated in place. The caller has checked that
        everything fits. If this raises, the counts are as before.
        """
