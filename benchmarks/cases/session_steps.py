"""What a session adds to a decode step: tokens chosen on the GPU, by the host, and the step of the backend alone.

Random weights in the shape of a known model; every row has a picture and some text in the cache. First greedy tokens of
the session are compared with the argmax of the backend's logits: they must be equal. Times are medians of steps that
all rows take part in; the backend's own step is the mean of launches that nobody waits for, with the choice of tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

TEXT = 64
STEPS, WARM_UP = 40, 8
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "temperature 1, top-k 50": {"temperature": 1.0, "top_k": 50},
    "temperature 4": {"temperature": 4.0, "top_p": 0.99},
    "greedy, penalty 1.2, log-probabilities": {"repetition_penalty": 1.2, "logprobs": True},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shape", default="internvl3-8b", help="preset to give random weights")
    parser.add_argument("--layers", type=int, help="decoder layers in place of the preset's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 98], help="rows")
    parser.add_argument("--visual-tokens", type=int, default=3328, help="of each row")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="how tokens are chosen")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table. Raises DependencyError without a GPU or libvkvx."""
    import torch

    from benchmarks.cases.decode import random_model
    from benchmarks.lib.gpu import library

    library()
    model = random_model(arguments.shape, arguments.layers)
    rows = []
    for batch in arguments.batch:
        backend = filled_backend(model, batch, arguments.visual_tokens)
        _check_tokens(backend)
        for way in arguments.ways:
            options = WAYS[way]
            alone = milliseconds_alone(backend, options)
            kernel = _kernel(backend, options)
            on_gpu = _scheduled(backend, options)
            on_host = _scheduled(_OnHost(backend), options, steps=3, warm_up=1)  # takes seconds a step
            rows.append(
                {
                    "shape": arguments.shape,
                    "rows": batch,
                    "tokens chosen by": way,
                    "backend ms": round(alone, 3),
                    "sampling us": round(kernel, 1),
                    "session ms": round(on_gpu, 3),
                    "session over backend": round(on_gpu / alone, 3),
                    "session with NumPy ms": round(on_host, 2),
                    "device": torch.cuda.get_device_name(),
                }
            )
        backend.close()
        del backend
        torch.cuda.empty_cache()
    return rows


class _OnHost:
    """A backend that chooses no tokens, so that a session does it from logits."""

    samples = False

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _Text:
    """In place of a processor: the tokenizer of tiny-llava."""

    placeholder_ids = (3,)

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        from vkvx.models.registry import resolve

        self._tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-llava").directory)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode([token % len(self._tokenizer) for token in token_ids])  # type: ignore[no-any-return]


def filled_backend(
    model: Any, batch: int, visual_tokens: int, dtype: str = "float16", group_size: int = 640, slots: int | None = None
) -> Any:
    """A backend whose first rows all hold the same picture and text."""
    from vkvx import ExportOptions
    from vkvx.manifest import Graph, Manifest
    from vkvx.models.registry import family_of
    from vkvx.runtime.backends.torch.backend import TorchBackend
    from vkvx.runtime.calls import build_call

    family = family_of(model)
    info = family.info(model.config, dtype)
    quantization = ExportOptions(bits=1, quantizer="lloyd", group_size=group_size).resolve(info.cached_layers, 640)
    manifest = Manifest("", 1, info, quantization, {"vision": Graph("", 18, (), ())}, ".", {})
    backend = TorchBackend(model, family, manifest, slots=slots or batch, visual_tokens=visual_tokens, text_tokens=1024)
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.full(visual_tokens, info.image_token_id), rng.integers(4, 1000, TEXT)]).astype(np.int32)
    first = backend.cache.row(0, ids, (visual_tokens,))
    call = build_call([first], group_size=group_size, image_token_id=info.image_token_id)
    embeds = rng.standard_normal((1, call.visual_index.shape[1], info.embed_width), np.float32)
    backend.step(call, embeds.astype(dtype))
    for row in range(1, batch):
        backend.cache.fork(0, row)
    return backend


def _reset(backend: Any) -> None:
    backend.cache.text_count[:] = TEXT
    backend.cache.next_position[:] = backend.cache.visual_tokens(0) + TEXT


def decode_call(backend: Any, tokens: Sequence[int]) -> Any:
    from vkvx.runtime.calls import build_call

    rows = [backend.cache.row(row, np.array([token], np.int32)) for row, token in enumerate(tokens)]
    return build_call(rows, group_size=640, image_token_id=-1)


def _sampled(backend: Any, options: dict[str, Any]) -> list[Any]:
    from vkvx.runtime.backends.base import SampledRow

    plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **options}
    wants = plain.pop("logprobs", False)
    return [SampledRow(seed=row, step=0, wants_log_probability=wants, **plain) for row in range(backend.cache.slots)]


def _check_tokens(backend: Any) -> None:
    """Greedy tokens of a session are those of the backend's logits."""
    firsts = list(range(10, 10 + backend.cache.slots))
    _reset(backend)
    tokens, expected = firsts, []
    for _ in range(6):
        logits = backend.step(decode_call(backend, tokens), None)
        logits[:, 3] = -np.inf  # the token of a picture is never chosen
        tokens = logits.argmax(axis=1).tolist()
        expected.append(tokens)
    found = [[0] * len(firsts) for _ in range(6)]
    for step, results in enumerate(itertools.islice(_steps(backend, {"ignore_eos": True}), 6)):
        for chunk in results:
            found[step][chunk.row] = chunk.token_ids[0]
    if found != expected:
        raise SystemExit("greedy tokens of a session are not those of the backend's logits")


def _steps(backend: Any, options: dict[str, Any]) -> Iterator[list[Any]]:
    """What the steps of a session's scheduler add, for a request in every slot."""
    from vkvx.runtime.sessions.generation import Request
    from vkvx.runtime.sessions.processor import Prepared
    from vkvx.runtime.sessions.sampling import GenerationOptions
    from vkvx.runtime.sessions.scheduler import Scheduler

    _reset(backend)
    scheduler, text = Scheduler(backend), _Text()
    for row in range(backend.cache.slots):
        chosen = GenerationOptions(**{"max_new_tokens": 900, "seed": row, "ignore_eos": True, **options})
        prepared = Prepared(np.array([10 + row], np.int32), (), ())
        history = [0] * backend.cache.length(row)
        scheduler.submit(Request(row, prepared, chosen, text, backend, slot=row, history=history))  # type: ignore[arg-type]
    while scheduler.busy:
        results = scheduler.step()
        if results:
            yield results


def _scheduled(backend: Any, options: dict[str, Any], steps: int = STEPS, warm_up: int = WARM_UP) -> float:
    """Milliseconds between the results of steps."""
    times = []
    for results in itertools.islice(_steps(backend, options), warm_up + steps):
        assert len(results) == backend.cache.slots
        times.append(time.perf_counter())
    return 1000 * statistics.median(np.diff(times)[warm_up:])


def milliseconds_alone(backend: Any, options: dict[str, Any]) -> float:
    """Milliseconds of a step that nobody waits for, from launches one after another."""
    import torch

    _reset(backend)
    rows = _sampled(backend, options)
    for row in range(backend.cache.slots):
        backend.begin(row, [], [3])
    times = []
    for step in range(2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(WARM_UP if step == 0 else STEPS):
            pending = backend.launch(decode_call(backend, [-1] * len(rows)), None, rows)
        pending.result()
        times.append((time.perf_counter() - begun) / STEPS)
    return 1000 * times[1]


def _kernel(backend: Any, options: dict[str, Any]) -> float:
    """Microseconds of the choice of tokens from logits of such a model: a normal distribution."""
    import torch

    sampler, rows = backend._sampler, _sampled(backend, options)
    slot = torch.arange(len(rows), dtype=torch.int32, device="cuda")
    logits = torch.randn(len(rows), backend.manifest.model.vocab_size, device="cuda") * 2
    sampler.set_options(rows)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeats in (3, 20):
        begin.record()
        for _ in range(repeats):
            sampler.choose(logits, slot)
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / 20 * 1000
