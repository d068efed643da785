"""Choice of tokens on a GPU: ``vkvx_sample`` over the logits of a step, so that no step waits for the host.

The token of each slot stays on the device, where the next step takes it from; the host reads it while that step runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from vkvx.plugins.library import DTYPES, KernelLibrary, SampleParams, token_bits
from vkvx.runtime.backends.base import SampledRow
from vkvx.runtime.backends.sampling import CALLS, OPTIONS, read_results, write_options


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a GPU that the host does not wait for: it comes from pinned memory, which torch keeps until then."""
    return tensor.pin_memory().to(device, non_blocking=True)


class Uploads:
    """Copies to a tensor of the device that the host does not wait for.

    Each comes from pinned memory of its own, which is written to again only when the copy from it is done.
    """

    def __init__(self, target: Tensor) -> None:
        self._target = target
        pinned = (torch.zeros(target.shape, dtype=target.dtype, pin_memory=True) for _ in range(CALLS))
        self.sources = [(tensor, torch.cuda.Event()) for tensor in pinned]
        self._next = 0

    def begin(self) -> int:
        """The index in ``sources`` of the memory to fill."""
        self.sources[self._next][1].synchronize()
        return self._next

    def send(self) -> None:
        """Copy it, on the current stream."""
        source, event = self.sources[self._next]
        self._target.copy_(source, non_blocking=True)
        event.record()
        self._next = (self._next + 1) % len(self.sources)


class PendingTokens:
    """Tokens of a call on their way to the host. See :class:`vkvx.runtime.backends.base.PendingTokens`."""

    def __init__(self, pinned: Tensor, event: torch.cuda.Event) -> None:
        self._pinned, self._event = pinned, event

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        self._event.synchronize()
        return read_results(self._pinned.numpy())


class TokenSampler:
    """Samples for at most as many rows as there are slots, on the current stream of ``device``."""

    def __init__(self, library: KernelLibrary, slots: int, vocab_size: int, device: torch.device) -> None:
        self._library, self._vocab_size = library, vocab_size
        words = -(-vocab_size // 32)
        self.last_token = torch.zeros(slots, dtype=torch.int32, device=device)
        """Of each slot: the token chosen last."""
        self._seen, self._excluded = (torch.zeros(slots, words, dtype=torch.int32, device=device) for _ in range(2))
        self._options = torch.zeros(slots, OPTIONS.itemsize, dtype=torch.uint8, device=device)
        self._uploads = Uploads(self._options)
        self._results = torch.zeros(2, slots, dtype=torch.int32, device=device)

    def begin(self, slot: int, seen: Iterable[int], excluded: Iterable[int]) -> None:
        """Start a sequence in a slot: tokens that the repetition penalty weakens, and tokens that are never chosen."""
        self._set(self._seen, slot, seen)
        self._set(self._excluded, slot, excluded)

    def exclude(self, slot: int, tokens: Iterable[int]) -> None:
        """Tokens that are never chosen in a slot from now on."""
        self._set(self._excluded, slot, tokens)

    def _set(self, bits: Tensor, slot: int, tokens: Iterable[int]) -> None:
        bits[slot] = upload(torch.from_numpy(token_bits(tokens, self._vocab_size)), bits.device)

    def set_options(self, rows: Sequence[SampledRow]) -> None:
        """Send the options of the next call's rows."""
        write_options(self._uploads.sources[self._uploads.begin()][0].numpy().view(OPTIONS)[:, 0], rows)
        self._uploads.send()

    def choose(self, logits: Tensor, slot: Tensor) -> None:
        """Choose the tokens of logits [B, V], whose rows are those of ``slot`` INT32 [B] and of the options sent."""
        token, probability = self._results
        params = SampleParams(
            dtype=DTYPES[str(logits.dtype).removeprefix("torch.")],
            rows=len(logits),
            vocab=self._vocab_size,
            logits_stride=logits.stride(0),
            logits=logits.data_ptr(),
            options=self._options.data_ptr(),
            slot=slot.data_ptr(),
            seen=self._seen.data_ptr(),
            excluded=self._excluded.data_ptr(),
            token=token.data_ptr(),
            last_token=self.last_token.data_ptr(),
            log_probability=probability.data_ptr(),
        )
        with torch.cuda.device(logits.device):
            self._library.sample(params, torch.cuda.current_stream().cuda_stream)

    def pending(self, rows: int) -> PendingTokens:
        """The tokens of the call that was chosen for last, once the device has them."""
        pinned = torch.empty(self._results.shape, dtype=torch.int32, pin_memory=True)
        pinned.copy_(self._results, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return PendingTokens(pinned[:, :rows], event)
