"""Times a backend: pictures, prefill and decode steps of a full batch, with inputs that need no processor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vkvx.errors import CapacityError, DependencyError, OptionError
from vkvx.manifest import Progress
from vkvx.models.pictures.base import prompt_positions
from vkvx.models.pictures.kinds import open_pictures
from vkvx.runtime.backends import golden
from vkvx.runtime.backends.base import Backend, CallInParts, SampledRow, SamplingBackend
from vkvx.runtime.backends.registry import choose_backend
from vkvx.runtime.backends.tensorrt.device import DeviceArray
from vkvx.runtime.bundles import load_manifest
from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.engines.gpus import load_cuda
from vkvx.runtime.sessions.pieces import check_prefill_chunk, cut

if TYPE_CHECKING:
    from vkvx.runtime.backends.torch.backend import TorchBackend

GREEDY = SampledRow(0.0, 0, 1.0, 1.0, seed=0, step=0, wants_log_probability=False)


@dataclass(frozen=True)
class Load:
    """What is timed: ``batch_size`` rows, each with ``pictures`` pictures and ``prompt_tokens`` text tokens, then
    ``steps`` decode steps; all ``repeats`` times, after one round that does not count. Prompts of more than
    ``prefill_chunk`` tokens are fed in pieces."""

    batch_size: int = 1
    pictures: int = 1
    prompt_tokens: int = 32
    steps: int = 64
    repeats: int = 3
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("pictures", 0), ("prompt_tokens", 1), ("steps", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise OptionError(f"{flag} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Latency:
    """Milliseconds over ``count`` calls."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Of times in seconds; percentiles interpolate linearly."""
        milliseconds = 1000 * np.asarray(seconds, np.float64)
        quantiles = (float(q) for q in np.percentile(milliseconds, (50, 90, 99)))
        return cls(len(seconds), float(milliseconds.mean()), *quantiles)


@dataclass(frozen=True)
class BenchResult:
    """Times and memory of one backend.

    ``vision`` is None without pictures. ``tokens_per_second`` counts the tokens of all rows in decode.
    ``cache_bytes_used`` are those that the sequences of the batch took, of ``cache_bytes_allocated``.
    ``device`` is what ran it, for people. ``process_bytes`` is how much memory the process took for the backend (None
    where the system does not tell), ``device_bytes`` how much of a GPU's memory was taken (None without one).
    """

    backend: str
    provider: str
    reason: str
    device: str
    load_seconds: float
    vision: Latency | None
    prefill: Latency
    decode: Latency
    tokens_per_second: float
    cache_bytes_used: int
    cache_bytes_allocated: int
    process_bytes: int | None
    device_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain types."""
        return asdict(self)


def bench_bundle(
    bundle: Path,
    backend: str,
    load: Load,
    *,
    provider: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> BenchResult:
    """Open a bundle in a backend ("auto" chooses one) with just the cache that the load needs, and time it.

    Raises what opening raises, and CapacityError if a sequence is longer than the model's positions.
    """
    manifest = load_manifest(bundle)
    check_prefill_chunk(manifest, load.prefill_chunk)
    found = choose_backend(backend, bundle, manifest, provider, threads)
    if verify:
        manifest.verify(bundle, progress)
    tokens, size = golden.picture(manifest, manifest.model.usual_tokens).tokens, manifest.quantization.group_size
    length = load.pictures * tokens + load.prompt_tokens + load.steps
    if length > manifest.model.max_positions:
        raise CapacityError(
            f"sequences of {length} tokens are longer than the {manifest.model.max_positions} positions of the model; "
            "give fewer --pictures, --prompt-tokens or --steps"
        )
    before, free = resident_bytes(), device_bytes_used(found.gpu)
    started = time.perf_counter()
    opened = found.open(
        slots=load.batch_size,
        visual_tokens=load.pictures * -(-tokens // size) * size,
        text_tokens=load.prompt_tokens + load.steps,
        verify=verify,
    )
    seconds = time.perf_counter() - started
    try:
        if load.prefill_chunk is not None and found.name == "torch":
            cast("TorchBackend", opened).capture_prefills(load.prefill_chunk)
        vision, prefill, decode, used = time_backend(opened, load, progress)
        after, taken = resident_bytes(), device_bytes_used(found.gpu)
    finally:
        opened.close()
    return BenchResult(
        backend=opened.name,
        provider=opened.provider,
        reason=found.reason,
        device=opened.device,
        load_seconds=seconds,
        vision=Latency.of(vision) if vision else None,
        prefill=Latency.of(prefill),
        decode=Latency.of(decode),
        tokens_per_second=load.batch_size * len(decode) / sum(decode),
        cache_bytes_used=used,
        cache_bytes_allocated=opened.cache.allocated_bytes,
        process_bytes=None if before is None or after is None else max(0, after - before),
        device_bytes=None if free is None or taken is None else taken - free,
    )


def time_backend(
    backend: Backend, load: Load, progress: Progress | None = None
) -> tuple[list[float], list[float], list[float], int]:
    """Seconds of each vision call, prefill and decode step, and the bytes of the cache that the batch took in the end.

    A vision call encodes the pictures of the whole batch, and a prefill feeds all rows in as many calls as the
    backend's limits ask for. Tokens are chosen greedily, as a session does: where the backend chooses them itself, a
    step is launched before the tokens of the one before are read. What waits for the device is a part of the times.
    """
    manifest, cache, limits = backend.manifest, backend.cache, backend.limits
    size, image_token = cache.group_size, manifest.model.image_token_id
    example = golden.picture(manifest, manifest.model.usual_tokens)
    tokens = example.tokens
    calls = open_pictures(manifest.model.pictures).join([example] * load.pictures) if load.pictures else ()
    prompt = [image_token] * (tokens * load.pictures) + golden.text(manifest, load.prompt_tokens)
    positions = prompt_positions(np.array(prompt) == image_token, [example] * load.pictures)
    prompt_ids, lengths = np.array(prompt, np.int32), (tokens,) * load.pictures
    pieces = cut(prompt_ids, lengths, manifest, load.prefill_chunk)
    rows = load.batch_size if limits is None else min(load.batch_size, limits.batch_size)
    vision, prefill, decode = list[float](), list[float](), list[float]()
    total, used = (1 + load.repeats) * (load.steps + 1), 0
    done = 0

    def count(steps: int = 1) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress(f"bench {backend.name}", done, total)

    def launch(rows: Sequence[Row], embeds: Sequence[Any] = ()) -> Callable[[], np.ndarray]:
        """What waits for the tokens of a call."""
        call = build_call(rows, group_size=size, image_token_id=image_token)
        placed = backend.place(call, embeds) if embeds else None
        if backend.samples:
            pending = cast(SamplingBackend, backend).launch(call, placed, [GREEDY] * len(rows))
            while isinstance(pending, CallInParts) and pending.advance():
                pass  # nothing runs beside it
            return lambda: pending.result()[0]
        chosen = backend.step(call, placed).argmax(axis=1)
        return lambda: chosen

    def step(slots: Sequence[int], fed: Sequence[int]) -> Callable[[], np.ndarray]:
        return launch([cache.row(slot, np.array([token], np.int32)) for slot, token in zip(slots, fed, strict=True)])

    def fill(slots: Sequence[int], embeds: Sequence[Any]) -> np.ndarray:
        for piece in pieces:
            given = [piece.row(cache, slot, prompt_ids, positions, 0, embeds=sum(lengths)) for slot in slots]
            chosen = launch(given, embeds if piece.picture_lengths else ())()
        return chosen

    for round_ in range(1 + load.repeats):
        slots = [cache.acquire() for _ in range(load.batch_size)]
        if backend.samples:
            for slot in slots:
                cast(SamplingBackend, backend).begin(slot, (), ())
        started = time.perf_counter()
        embeds = [[backend.encode(inputs) for inputs in calls] for _ in slots] if calls else []
        if embeds and isinstance(embeds[-1][-1], DeviceArray):
            embeds[-1][-1].device.synchronize()
        encoded = time.perf_counter()
        chosen = np.concatenate(
            [fill(slots[i : i + rows], [*itertools.chain(*embeds[i : i + rows])]) for i in range(0, len(slots), rows)]
        )
        filled = time.perf_counter()
        count()
        if round_:
            prefill.append(filled - encoded)
            if embeds:
                vision.append(encoded - started)
        last, waited = time.perf_counter(), step(slots, chosen.tolist())
        for i in range(load.steps):
            more = i + 1 < load.steps
            following = step(slots, [-1] * len(slots)) if more and backend.samples else None
            fed = waited().tolist()
            now = time.perf_counter()
            if round_:
                decode.append(now - last)
            last = now
            count()
            if more:
                waited = following or step(slots, fed)
        used = sum(cache.bytes_used(slot) for slot in slots)
        for slot in slots:
            cache.release(slot)
    return vision, prefill, decode, used


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM, where the system tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    import resource

    return pages * resource.getpagesize()


def device_bytes_used(gpu: int) -> int | None:
    """Memory of a GPU, by its CUDA index, that is taken, by whatever process; None without it or cuda-python."""
    try:
        cuda = load_cuda()
    except DependencyError:
        return None
    (error,) = cuda.cudaSetDevice(gpu)
    if error != cuda.cudaError_t.cudaSuccess:
        return None
    error, free, total = cuda.cudaMemGetInfo()
    return int(total - free) if error == cuda.cudaError_t.cudaSuccess else None
