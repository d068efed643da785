"""Gaps between the tokens of live rows on a GPU while long prompts arrive, which are fed whole or in pieces.

Random weights in the shape of a known model; each live row has a picture and some text in the cache. Prompts of a
picture and some text arrive by a Poisson process, the same for all limits of a piece, and leave with their first token.
That token is compared with the argmax of the logits of the same pieces fed one by one: they must be equal. "off" is how
far these logits are from those of eager calls, as a share of their range. Pictures come encoded: the vision tower is no
part of this. A gap is the time between two tokens of a live row, as the scheduler hands them out; the step is the
median gap while nothing arrives. "prefill MiB" is what calls allocate at their peak, without what graphs hold.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

TEXT = 100
STEPS, WARM_UP = 40, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shape", default="internvl3-8b", help="preset to give random weights")
    parser.add_argument("--layers", type=int, help="decoder layers in place of the preset's")
    parser.add_argument("--live", type=int, default=32, help="rows that decode")
    parser.add_argument("--visual-tokens", type=int, default=3328, help="of each row and prompt")
    parser.add_argument("--group-size", type=int, default=256, help="visual tokens of a group")
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 512, 768, 1024], help="limits; 0: whole prompts")
    parser.add_argument("--prompts", type=int, default=8, help="that arrive")
    parser.add_argument("--seconds", type=float, default=0.5, help="between arrivals, on average")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    import torch

    from benchmarks.cases.decode import random_model
    from benchmarks.cases.session_steps import filled_backend

    model = random_model(arguments.shape, arguments.layers)
    backend = filled_backend(
        model, 1, arguments.visual_tokens, group_size=arguments.group_size, slots=arguments.live + 2
    )
    trace = _Trace(backend, arguments)
    rows = []
    for limit in arguments.chunks:
        chunk = limit or None
        if chunk is not None:
            backend.capture_prefills(chunk)
        off = trace.check_token(chunk)
        trace.run(chunk, trace.arrivals[:1] * 2)  # captures, fills pools
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = trace.run(chunk, trace.arrivals)
        rows.append(
            {
                "shape": arguments.shape,
                "live rows": arguments.live,
                "piece": limit or "whole",
                "group": arguments.group_size,
                "off": f"{off:.1g}",
                **found,
                "prefill MiB": round((torch.cuda.max_memory_allocated() - before) / 2**20),
                "device": torch.cuda.get_device_name(),
            }
        )
        print(rows[-1], flush=True)
    backend.close()
    return rows


class _Trace:
    """Live rows of one backend, and prompts that arrive."""

    def __init__(self, backend: Any, arguments: argparse.Namespace) -> None:
        from benchmarks.cases.session_steps import _Text
        from vkvx.runtime.sessions.processor import Prepared

        rng = np.random.default_rng(1)
        self.backend, self.text = backend, _Text()
        self.arrivals = list(np.cumsum(rng.exponential(arguments.seconds, arguments.prompts)))
        cache, info, visual = backend.cache, backend.manifest.model, arguments.visual_tokens
        full = cache.mark(0)
        self.slots = [cache.acquire() for _ in range(arguments.live)]
        cache.rewind(0, full)
        for slot in self.slots[1:]:
            cache.fork(0, slot)
        self.full = [cache.mark(slot) for slot in self.slots]
        texts = rng.integers(4, 1000, TEXT)
        ids = np.concatenate([texts[:40], np.full(visual, info.image_token_id), texts[40:]]).astype(np.int32)
        self.prompt = Prepared(ids, ({"pixel_values": np.zeros(1)},), (visual,))
        self.embeds = rng.standard_normal((visual, info.embed_width), np.float32).astype(info.dtype)
        self._put_embeds()

    def _put_embeds(self) -> None:
        import torch

        from vkvx.runtime.backends.torch.backend import DeviceEmbeds

        held = DeviceEmbeds(torch.from_numpy(self.embeds).cuda(), self.backend._stream)
        self.backend.encode = lambda inputs: held

    def request(self, row: int, chunk: int | None, prompt: Any, tokens: int, **place: Any) -> Any:
        from vkvx.runtime.sessions.generation import Request
        from vkvx.runtime.sessions.sampling import GenerationOptions

        options = GenerationOptions(max_new_tokens=tokens, ignore_eos=True)
        return Request(row, prompt, options, self.text, self.backend, prefill_chunk=chunk, **place)  # type: ignore[arg-type]

    def check_token(self, chunk: int | None) -> float:
        """Compare a first token with that of pieces fed one by one; how far captured pieces are from eager ones."""
        from vkvx.runtime.sessions.scheduler import run

        (found,) = run(self.backend, [self.request(0, chunk, self.prompt, 1)], chunk)
        logits = self._logits(chunk)
        captured, self.backend._prefills = self.backend._prefills, None
        eager = self._logits(chunk)
        self.backend._prefills = captured
        if found.token_ids != (int(logits.argmax()),):
            raise SystemExit("the first token of a prompt is not that of its pieces fed one by one")
        return float(np.abs(logits - eager).max() / np.ptp(eager))

    def _logits(self, chunk: int | None) -> np.ndarray:
        """Of the last token of a prompt whose pieces are fed one by one."""
        from vkvx.runtime.calls import build_call, place_embeds
        from vkvx.runtime.sessions.pieces import cut

        cache, manifest = self.backend.cache, self.backend.manifest
        image, size = manifest.model.image_token_id, manifest.quantization.group_size
        slot, logits = cache.acquire(), np.empty(0)
        for piece in cut(self.prompt.token_ids, self.prompt.picture_lengths, manifest, chunk):
            row = cache.row(slot, self.prompt.token_ids[piece.start : piece.end], piece.picture_lengths)
            call = build_call([row], group_size=size, image_token_id=image)
            rows = self.embeds[piece.first_embed : piece.last_embed]
            logits = self.backend.step(call, place_embeds(call, rows) if len(rows) else None)[0]
        cache.release(slot)
        logits[[3, image]] = logits.min()  # tokens of pictures are never chosen
        return logits

    def run(self, chunk: int | None, arrivals: list[float]) -> dict[str, Any]:
        """Decode until all prompts have come and gone."""
        from vkvx.runtime.sessions.generation import Failure
        from vkvx.runtime.sessions.processor import Prepared
        from vkvx.runtime.sessions.scheduler import Scheduler

        scheduler, live = Scheduler(self.backend, chunk), len(self.slots)
        for row, slot in enumerate(self.slots):
            self.backend.cache.rewind(slot, self.full[row])
            token = Prepared(np.array([10 + row], np.int32), (), ())
            history = [0] * self.backend.cache.length(slot)
            scheduler.submit(self.request(row, None, token, 900, slot=slot, history=history))
        at, busy, firsts, came = list[float](), list[bool](), list[float](), dict[int, float]()
        begun, submitted = 0.0, 0
        while len(firsts) < len(arrivals):
            results = scheduler.step()
            now = time.perf_counter()
            if any(result.row == 0 for result in results):
                at.append(now)
                busy.append(bool(came))
            if len(at) == STEPS + WARM_UP and not begun:
                begun = now
            for result in results:
                assert not isinstance(result, Failure), result
                if result.row >= live:
                    firsts.append(now - came.pop(result.row))
            while begun and submitted < len(arrivals) and now - begun >= arrivals[submitted]:
                came[live + submitted] = begun + arrivals[submitted]
                scheduler.submit(self.request(live + submitted, chunk, self.prompt, 1))
                submitted += 1
        scheduler.close()
        gaps = 1000 * np.diff(at)
        step = statistics.median(gaps[WARM_UP : STEPS + WARM_UP - 1])
        under_load = gaps[STEPS + WARM_UP :]
        return {
            "step ms": round(float(step), 2),
            "median gap ms": round(float(np.median(under_load)), 2),
            "p99 gap ms": round(float(np.quantile(under_load, 0.99)), 1),
            "largest gap ms": round(float(under_load.max()), 1),
            "p99 over step": round(float(np.quantile(under_load, 0.99) / step), 2),
            "first token ms": round(1000 * float(statistics.median(firsts)), 1),
            "tokens/s of live rows": round(live * len(under_load) / (at[-1] - at[STEPS + WARM_UP])),
        }
