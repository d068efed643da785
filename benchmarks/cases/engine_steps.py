"""What a session adds to a decode step of an engine: tokens chosen on the GPU, by the host, and the engine alone.

    python -m benchmarks.cases.engine_steps BUNDLE [--rows 1 32] [--output FILE]

Every row has a picture and a prompt in the cache. Tokens chosen on the GPU are compared first with those that NumPy
chooses from the same engine's logits: they must be equal. "engine ms" is the mean of replays of a step that gives
logits, "launches ms" of launches that choose tokens and nobody waits for; the others are medians of the times between
the results of a session's steps. Needs numpy, cuda-python and TensorRT only.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases.session_steps import WAYS
from vkvx.errors import VkvxError
from vkvx.manifest import Manifest
from vkvx.runtime.backends import golden
from vkvx.runtime.backends.base import SampledRow
from vkvx.runtime.backends.registry import open_backend
from vkvx.runtime.calls import Call, build_call
from vkvx.runtime.sessions.generation import Request
from vkvx.runtime.sessions.processor import Prepared
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import Scheduler

CHECKED, STEPS, WARM_UP = 12, 100, 16
TEXT_TOKENS = 400


class Text:
    """In place of a processor: a letter a token."""

    placeholder_ids = ()

    @staticmethod
    def decode(token_ids: Sequence[int]) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)


class Rows:
    """A backend whose slots all hold a picture and ``start`` tokens in all."""

    def __init__(self, bundle: Path, name: str, rows: int) -> None:
        manifest = Manifest.load(bundle)
        tokens, size = manifest.model.usual_tokens, manifest.quantization.group_size
        visual = -(-tokens // size) * size if manifest.layout.is_packed else tokens
        capacity = {"slots": rows, "visual_tokens": visual, "text_tokens": TEXT_TOKENS}
        self.backend: Any = open_backend(name, bundle, manifest, **capacity)
        if not self.backend.samples:
            raise VkvxError("the backend does not choose tokens itself; its log says why")
        self.sampler = self.backend.sampler
        for _ in range(rows):
            golden.run(self.backend, self.backend.cache.acquire())
        cache = self.backend.cache
        self.counts = cache.visual_count.copy(), cache.text_count.copy(), cache.next_position.copy()

    def reset(self, *, on_gpu: bool) -> None:
        """Forget the answers of the last run."""
        cache = self.backend.cache
        for held, counts in zip((cache.visual_count, cache.text_count, cache.next_position), self.counts, strict=True):
            held[...] = counts
        self.backend.sampler = self.sampler if on_gpu else None

    def call(self, token: int) -> Call:
        """A decode step of all rows."""
        cache = self.backend.cache
        rows = [cache.row(slot, np.array([token], np.int32)) for slot in range(cache.slots)]
        return build_call(rows, group_size=cache.group_size, image_token_id=-1)

    def steps(self, options: dict[str, Any], *, on_gpu: bool) -> Iterator[list[Any]]:
        """What the steps of a session's scheduler add, for a request in every slot."""
        self.reset(on_gpu=on_gpu)
        backend, scheduler = self.backend, Scheduler(self.backend)
        for row in range(backend.cache.slots):
            chosen = GenerationOptions(**{"max_new_tokens": 300, "seed": row, "ignore_eos": True, **options})
            prepared = Prepared(np.array([10 + row], np.int32), (), ())
            history = [0] * backend.cache.length(row)
            scheduler.submit(Request(row, prepared, chosen, Text(), backend, slot=row, history=history))  # type: ignore[arg-type]
        while scheduler.busy:
            if results := scheduler.step():
                yield results

    def tokens(self, options: dict[str, Any], *, on_gpu: bool) -> list[list[tuple[int, ...]]]:
        """The first tokens of all rows, by step."""
        found = itertools.islice(self.steps(options, on_gpu=on_gpu), CHECKED)
        return [[chunk.token_ids for chunk in sorted(results, key=lambda one: one.row)] for results in found]

    def session(self, options: dict[str, Any], *, on_gpu: bool) -> float:
        """Milliseconds between the results of steps."""
        steps, warm_up = (STEPS, WARM_UP) if on_gpu else (10, 3)
        times = []
        # Rows beyond the batch of a prefill join later.
        whole = (results for results in self.steps(options, on_gpu=on_gpu) if len(results) == self.backend.cache.slots)
        for _ in itertools.islice(whole, warm_up + steps):
            times.append(time.perf_counter())
        return 1000 * statistics.median(np.diff(times)[warm_up:])

    def launches(self, options: dict[str, Any]) -> float:
        """Milliseconds of a step that chooses tokens, from launches one after another."""
        plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **options}
        wants = plain.pop("logprobs", False)
        slots = range(self.backend.cache.slots)
        rows = [SampledRow(seed=slot, step=0, wants_log_probability=wants, **plain) for slot in slots]
        for steps in (WARM_UP, STEPS):
            self.reset(on_gpu=True)
            self.backend.gpu.synchronize()
            begun = time.perf_counter()
            for _ in range(steps):
                pending = self.backend.launch(self.call(-1), None, rows)
            pending.result()
        return 1000 * (time.perf_counter() - begun) / STEPS

    def engine(self) -> float:
        """Milliseconds of the engine's own step, with logits that stay where they are."""
        self.reset(on_gpu=False)
        for _ in range(2):  # the second is captured
            self.backend.step(self.call(7), None)
        (graph,) = (self.backend.logits_graphs[rows] for rows in [max(self.backend.logits_graphs)])
        for steps in (WARM_UP, STEPS):
            begun = time.perf_counter()
            for _ in range(steps):
                graph.launch()
            self.backend.gpu.synchronize()
        return 1000 * (time.perf_counter() - begun) / STEPS


def run(bundle: Path, name: str, rows: int) -> Iterator[dict[str, Any]]:
    """Lines of the table."""
    held = Rows(bundle, name, rows)
    engine = held.engine()
    for way, options in WAYS.items():
        if held.tokens(options, on_gpu=True) != held.tokens(options, on_gpu=False):
            raise VkvxError(f"{way}: tokens chosen on the GPU are not those of NumPy")
        on_gpu = held.session(options, on_gpu=True)
        yield {
            "bundle": bundle.name,
            "rows": rows,
            "tokens chosen by": way,
            "engine ms": round(engine, 3),
            "launches ms": round(held.launches(options), 3),
            "session ms": round(on_gpu, 3),
            "session over engine": round(on_gpu / engine, 3),
            "session with NumPy ms": round(held.session(options, on_gpu=False), 3),
            "device": held.backend.device,
            "library": held.backend.engines.library.name,
        }
    held.backend.close()


def main(argv: list[str]) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.engine_steps", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--backend", default="tensorrt")
    parser.add_argument("--output", type=Path, help="file for the lines, as JSON")
    arguments = parser.parse_args(argv)
    lines = []
    try:
        for rows in arguments.rows:
            for line in run(arguments.bundle, arguments.backend, rows):
                lines.append(line)
                print(json.dumps(line), flush=True)
    except (VkvxError, OSError) as error:
        parser.error(str(error))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    faulthandler.enable()  # libraries of the GPU may end the process
    main(sys.argv[1:])
