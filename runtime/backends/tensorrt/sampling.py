"""Choice of tokens behind an engine: ``vkvx_sample`` over its logits, so that no step waits for the host.

The C interface of libvkvx comes out of the plugin beside the engines, else from a libvkvx that is built. The token of
each slot stays on the device, where the next step takes it from; the host reads it while that step runs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vkvx.errors import DependencyError
from vkvx.plugins import build
from vkvx.plugins.library import DTYPES, MAX_VOCAB, KernelLibrary, SampleParams, token_bits
from vkvx.runtime.backends.sampling import read_results
from vkvx.runtime.backends.tensorrt.device import Device, DeviceArray, Event, PinnedMemory
from vkvx.runtime.backends.tensorrt.engine import Engines
from vkvx.runtime.engines.manifest import DECODER, PluginInfo

LOG = logging.getLogger("vkvx.runtime.backends.tensorrt")


def open_kernels(directory: Path, plugin: PluginInfo | None) -> KernelLibrary:
    """The C interface of libvkvx for engines in a directory. Raises DependencyError without one of this version."""
    if plugin is not None and not plugin.embedded:
        try:
            return KernelLibrary(directory / plugin.file)
        except DependencyError:  # a plugin of an older vkvx
            pass
    path = build.find_library()
    if path is None:
        raise DependencyError(
            "libvkvx of this version is neither beside the engines nor built; run `vkvx build BUNDLE --force` or "
            "`vkvx plugin build`"
        )
    return KernelLibrary(path)


def open_sampler(engines: Engines, device: Device, slots: int, vocab_size: int) -> TokenSampler | None:
    """What chooses tokens behind these engines; where that cannot be, None, and one line in the log says why."""
    (logits,) = (tensor for tensor in engines.manifest.engine_tensors(DECODER, "output") if tensor.name == "logits")
    if logits.dtype not in DTYPES:
        _tell(f"logits are {logits.dtype}")
        return None
    if vocab_size > MAX_VOCAB:
        _tell(f"{vocab_size:,} tokens are more than {MAX_VOCAB:,}")
        return None
    try:
        library = open_kernels(engines.directory, engines.manifest.plugin)
    except DependencyError as error:
        _tell(str(error))
        return None
    return TokenSampler(library, device, slots, vocab_size)


@functools.cache
def _tell(reason: str) -> None:
    LOG.warning("tokens are chosen on the host, which is slower: %s", reason)


class TokenSampler:
    """What is known of the tokens of each slot, in the memory of a device; its work goes to the device's stream."""

    def __init__(self, library: KernelLibrary, device: Device, slots: int, vocab_size: int) -> None:
        self._library, self._device, self._vocab_size = library, device, vocab_size
        words = -(-vocab_size // 32)
        self._seen, self._excluded = (device.allocate("int32", (slots, words)) for _ in range(2))
        self._last_token = device.allocate("int32", (slots,))
        for array in (self._seen, self._excluded, self._last_token):
            device.clear(array)

    def begin(self, slot: int, seen: Iterable[int], excluded: Iterable[int]) -> None:
        """Start a sequence in a slot: tokens that the repetition penalty weakens, and tokens that are never chosen."""
        self._set(self._seen, slot, seen)
        self._set(self._excluded, slot, excluded)

    def exclude(self, slot: int, tokens: Iterable[int]) -> None:
        """Tokens that are never chosen in a slot from now on."""
        self._set(self._excluded, slot, tokens)

    def _set(self, bits: DeviceArray, slot: int, tokens: Iterable[int]) -> None:
        row = token_bits(tokens, self._vocab_size)
        self._device.upload(DeviceArray(self._device, "int32", row.shape, bits.address + slot * row.nbytes), row)

    def feed(self, rows: int, slot: int, input_ids: int) -> None:
        """Queue: -1 in INT32 ``input_ids`` [rows] becomes the token chosen last in the row's ``slot`` (addresses)."""
        self._library.last_tokens(rows, slot, self._last_token.address, input_ids, self._stream)

    def choose(self, logits: DeviceArray, slot: int, options: int, results: DeviceArray) -> None:
        """Queue the choice of tokens by logits [B, V] into ``results`` INT32 [2, B].

        ``slot`` INT32 [B], -1 in idle rows, and ``options`` (``vkvx.runtime.backends.sampling.OPTIONS`` [B]) are
        addresses on the device.
        """
        rows = len(logits)
        params = SampleParams(
            dtype=DTYPES[logits.dtype],
            rows=rows,
            vocab=self._vocab_size,
            logits_stride=self._vocab_size,
            logits=logits.address,
            options=options,
            slot=slot,
            seen=self._seen.address,
            excluded=self._excluded.address,
            token=results.address,
            last_token=self._last_token.address,
            log_probability=results.address + 4 * rows,
        )
        self._library.sample(params, self._stream)

    @property
    def _stream(self) -> int:
        return int(self._device.stream)


class Frame:
    """Pinned memory of one call: ``inputs`` that it brings, tokens that it gives. It serves another call afterwards."""

    def __init__(self, device: Device, size: int, rows: int) -> None:
        self._device = device
        self.inputs = PinnedMemory(device, size)
        self._results = PinnedMemory(device, 8 * rows)
        self._done = Event(device)
        self._pending: PendingTokens | None = None

    def begin(self) -> None:
        """Wait for the call that had the memory before."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def receive(self, results: DeviceArray, rows: int) -> PendingTokens:
        """Queue the way of ``results`` INT32 [2, at least ``rows``] to the host."""
        self._device.copy(self._results.address, results.address, results.nbytes)
        self._done.record()
        self._pending = PendingTokens(self._results, results.shape[1], rows, self._done)
        return self._pending


class PendingTokens:
    """Tokens of a call on their way to the host. See :class:`vkvx.runtime.backends.base.PendingTokens`."""

    def __init__(self, pinned: PinnedMemory, width: int, rows: int, done: Event) -> None:
        """``pinned`` holds results [2, width], of which the first ``rows`` are of the call."""
        self._pinned, self._width, self._rows, self._done = pinned, width, rows, done
        self._result: tuple[np.ndarray, np.ndarray] | None = None

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        if self._result is None:
            self._done.synchronize()
            self._result = read_results(self._pinned.view(0, "int32", (2, self._width))[:, : self._rows].copy())
        return self._result
