"""What recorded queries make of the default quantiser at 1 bit, at once and for queries that come later, on tiny-llava.

One row a metric: that of the weights, those calibrated on answers to pages that tiny-llava was trained on, and one
calibrated on another task. Keys and values of the prompt are exact and the same for all, and the caches are simulated
densely in FP32 (``benchmarks.lib.simulation``). ``kl`` is the mean of KL(16 bits || setting) in nats a token along the
16-bit answer with keys and values packed; ``keys at d`` with keys alone, packed as if the queries came ``d`` positions
later. ``digits`` is what the setting reads right by itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.simulation import Layer, PageBatch, Simulation, Technique, batches
from benchmarks.lib.techniques import (
    KEYS,
    VALUES,
    LayerMetric,
    combine,
    exact,
    expected,
    expected_in_metric,
    quantized,
    shaped,
)
from vkvx.errors import DependencyError, OptionError
from vkvx.evaluation.tasks import DIGITS_PROMPT
from vkvx.models.graph.metric import Metrics, model_metrics, rotation
from vkvx.models.graph.moments import Moments, picture_shares, second_moments, unrotated
from vkvx.models.tiny_llava import data
from vkvx.plugins.reference import shaping

BATCH = 25
ANSWERS = (4, 16, 64)
DISTANCES = (0, 64, 256, 1024, 2048)
ROWS = "Read row {}."
"""The other task; pages ask for their rows by turns."""
LIMIT = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--pages", type=int, default=100, help="held-out pages (default 100)")
    parser.add_argument("--seed-start", type=int, default=5000, help="seed of the first page (default 5000)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU (default 2)")


def run(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Measure each metric on all pages; the rows so far after each batch of pages."""
    if arguments.pages < 1:
        raise OptionError(f"--pages {arguments.pages} is not supported; give at least 1")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise DependencyError("torch finds no CUDA device; give --device cpu")
    torch.set_num_threads(arguments.threads)
    simulation = Simulation(arguments.device)
    whole, keys = _techniques(simulation)
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in ("16 bits", *whole)}
    seeds = range(arguments.seed_start, arguments.seed_start + arguments.pages)
    for number, batch in enumerate(batches(simulation, seeds, "test", BATCH)):
        pairs = zip(simulation.texts(batch.tokens), batch.truths, strict=True)
        found["16 bits"].setdefault("digits", []).append(torch.tensor([data.right_digits(*pair) for pair in pairs]))
        for name, technique in whole.items():
            outcome = simulation.measure(batch, technique, free=True)
            assert outcome.digits is not None
            figures = {"kl": outcome.kl, "digits": outcome.digits}
            for distance, one in keys[name].items():
                figures[f"keys at {distance}"] = simulation.measure(batch, one).kl
            for column, values in figures.items():
                found[name].setdefault(column, []).append(values)
            print(f"page {number * BATCH} on: {name}: {float(outcome.kl.mean()):.4f}", flush=True)
        yield [_row(name, columns) for name, columns in found.items()]


def _techniques(simulation: Simulation) -> tuple[dict[str, Technique], dict[str, dict[int, Technique]]]:
    """By row: keys and values packed, and keys alone by distance."""
    make = partial(model_metrics, simulation.family, simulation.model, simulation.info)
    pages, rows = (
        record(simulation, max(ANSWERS), prompt)
        for prompt in (lambda i: DIGITS_PROMPT, lambda i: ROWS.format(i % 4 + 1))
    )
    metrics = {"weights": make()}
    metrics |= {f"{count} answers": make(pages[count]) for count in ANSWERS}
    metrics[f"{max(ANSWERS)} answers to another task"] = make(rows[max(ANSWERS)])
    lloyd = quantized(KEYS, "lloyd")
    whole = {"lloyd": combine(lloyd, quantized(VALUES, "lloyd"), expected(LIMIT))}
    keys = {"lloyd": {0: combine(lloyd, exact(VALUES))}}  # which knows no distance
    for name, one in metrics.items():
        now = key_metric(one, 0)
        whole[name] = combine(shaped(KEYS, now), shaped(VALUES, value_metric(one)), expected_in_metric(now, LIMIT))
        keys[name] = {d: combine(shaped(KEYS, key_metric(one, d)), exact(VALUES)) for d in DISTANCES}
    return whole, keys


def record(simulation: Simulation, count: int, prompt: Callable[[int], str]) -> dict[int, Moments]:
    """The moments of the answers to so many training pages, as ``vkvx calibrate`` records them: the first 1, 2, ..."""
    info = simulation.info
    total, found = Moments.empty(info, simulation.model.config, "pages", {}), {}
    for start in range(0, count, BATCH):
        seeds = range(start, min(count, start + BATCH))
        batch = simulation.batch(seeds, "train", [prompt(seed) for seed in seeds])
        for page, answer in enumerate(_answers(simulation, batch)):
            query, attention = zip(*answer, strict=True)
            total = Moments(
                total.model,
                [old + new for old, new in zip(total.query, query, strict=True)],
                [old + new for old, new in zip(total.attention, attention, strict=True)],
                samples=total.samples + 1,
                tokens=total.tokens + int(batch.live[page].sum()),
            )
            found[total.samples] = total
    return found


def _answers(simulation: Simulation, batch: PageBatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of each page the moments of each layer: [Hkv, D, D] and [Hq], on the CPU."""
    info, rotary = simulation.info, simulation.rotary
    for page, live in enumerate(batch.live):
        made = []
        for layer, answer in zip(batch.layers, batch.answered, strict=True):
            facts, fed = info.layers[layer.index], slice(0, int(live.sum()))
            query = answer.query[page, :, fed]
            keys = torch.cat([layer.key[page], answer.key[page, :, fed]], 1)
            visual = torch.zeros(keys.shape[1], dtype=torch.bool, device=keys.device)
            visual[layer.visual] = True
            shares = picture_shares(query, keys, visual, facts.scale)
            positions = batch.positions + torch.arange(query.shape[1], device=keys.device)
            raw = unrotated(query, rotation(rotary[layer.index], positions))
            made.append((second_moments(raw, facts.kv_heads).cpu(), shares.sum(1).cpu()))
        yield made


def key_metric(metrics: Metrics, distance: int) -> LayerMetric:
    """The metric of keys for queries that come so many positions later than an answer's."""

    def metric(layer: Layer) -> Tensor:
        at = torch.tensor([layer.key.shape[2] - 1 - distance], device=layer.key.device)
        cosine, sine = metrics.rotations(at)[layer.index].unbind(1)
        return shaping.rotate(metrics.key[layer.index], cosine, sine)[None]

    return metric


def value_metric(metrics: Metrics) -> LayerMetric:
    """The metric of values."""
    return lambda layer: metrics.value[layer.index].float()[None]


def _row(name: str, columns: dict[str, Sequence[Tensor]]) -> dict[str, Any]:
    counts = [sum(map(len, parts)) for parts in columns.values()]
    row: dict[str, Any] = {"metric": name, "pages": counts[0]}
    for column in ("kl", *(f"keys at {distance}" for distance in DISTANCES), "digits"):
        if column in columns:
            values = torch.cat(list(columns[column])).double()
            error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
            row[column], row[f"{column}, standard error"] = round(float(values.mean()), 5), round(float(error), 5)
        else:
            row[column], row[f"{column}, standard error"] = "-", "-"
    return row
