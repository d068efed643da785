"""Choice of tokens without a GPU: the rules of ``vkvx_sample`` by the CPU's sampler, and a stand-in for libvkvx."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import NumericError, OptionError
from vkvx.plugins.library import DTYPES, SampleParams, SampleRow
from vkvx.runtime.sessions.sampling import NONE_LEFT, NOT_NUMBERS, GenerationOptions, Sampler

if TYPE_CHECKING:
    from doubles import Cuda


def choose(logits: np.ndarray, row: Any, seen: Sequence[int], excluded: Sequence[int]) -> tuple[int, float]:
    """A token and its log-probability, by the options of a ``SampledRow`` or ``SampleRow``."""
    options = {name: getattr(row, name) for name in ("temperature", "top_k", "top_p", "seed", "repetition_penalty")}
    sampler = Sampler(GenerationOptions(logprobs=True, **options), len(logits), excluded)
    for _ in range(row.step):
        sampler.note(-1)  # no token that the penalty knows
    sampler.observe(list(seen))
    try:
        token, probability = sampler.choose(logits)
    except NumericError:
        return NOT_NUMBERS, np.nan
    except OptionError:
        return NONE_LEFT, np.nan
    assert probability is not None
    return token, probability


class SamplingLibrary:
    """``KernelLibrary`` for logits in FP32 in the memory of a :class:`doubles.Cuda`."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.sampled = 0

    def _array(self, address: int, shape: tuple[int, ...], dtype: Any = np.int32) -> np.ndarray:
        kind = np.dtype(dtype)
        size = kind.itemsize * int(np.prod(shape))
        self._cuda.check(address, size)
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), kind).reshape(shape)

    def last_tokens(self, rows: int, slot: int, last_token: int, input_ids: int, stream: int) -> None:
        self._cuda.check_stream(stream)

        def work() -> None:
            ids = self._array(input_ids, (rows,))
            for b, own in enumerate(self._array(slot, (rows,)).tolist()):
                if own >= 0 and ids[b] < 0:
                    ids[b] = self._array(last_token + 4 * own, (1,))[0]

        self._cuda.do(work)

    def sample(self, params: SampleParams, stream: int) -> None:
        self._cuda.check_stream(stream)
        held = SampleParams.from_buffer_copy(params)  # a graph keeps the parameters of its capture
        assert held.dtype == DTYPES["float32"]
        self._cuda.do(lambda: self._sample(held))

    def _sample(self, p: SampleParams) -> None:
        words = -(-p.vocab // 32)
        for b, slot in enumerate(self._array(p.slot, (p.rows,)).tolist()):
            if slot < 0:
                continue
            row = SampleRow.from_buffer_copy(self._array(p.options + 32 * b, (32,), np.uint8).tobytes())
            seen, excluded = (self._array(start + 4 * words * slot, (words,)) for start in (p.seen, p.excluded))
            known, never = (
                np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")) for bits in (seen, excluded)
            )
            logits = self._array(p.logits + 4 * p.logits_stride * b, (p.vocab,), np.float32)
            token, probability = choose(logits, row, known, never)
            self._array(p.token, (p.rows,))[b] = token
            self._array(p.last_token + 4 * slot, (1,))[0] = max(token, 0)
            if row.wants_log_probability:
                self._array(p.log_probability, (p.rows,), np.float32)[b] = probability
            if token >= 0:
                seen[token // 32] |= np.uint32(1 << token % 32).astype(np.int32)
            self.sampled += 1
