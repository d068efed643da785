"""What helps a visual cache of 1 bit, and what does not: methods that were tried on tiny-llava.

One row a method. Most are not part of the product; ``docs/accuracy.md`` draws on this table. Keys and values of the
prompt are exact and the same for all methods, the caches are simulated densely in FP32 (``benchmarks.lib.simulation``),
and ``kl`` is the mean of KL(16 bits || method) in nats a token along the 16-bit answer, the sensitive figure.
``digits`` and ``pages`` are what the method reads right by itself, for the main methods only.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.simulation import Divergence, Layer, PageBatch, Simulation, Technique, batches
from benchmarks.lib.techniques import (
    KEYS,
    VALUES,
    Coder,
    Correction,
    LayerMetric,
    affine,
    bias_corrected,
    by_layer,
    combine,
    error_feedback,
    exact,
    expected,
    expected_by_covariance,
    expected_in_metric,
    prompt_metric,
    quantized,
    regularised,
    rotated,
    second_moment,
    shaped,
    weighted,
)
from vkvx.errors import DependencyError, OptionError
from vkvx.models.graph.metric import FLOOR, REACH, model_metrics, rotation
from vkvx.plugins.reference import shaping

BATCH = 25
CALIBRATION_PAGES, TAU_PAGES = 50, 20
TAUS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
OFFSETS = (0, 64, 256, 1024)
STEPS = (1.6, 1.9, 2.2, 2.5)
"""Distances of the two levels in standard deviations: Lloyd's for normal numbers, and wider."""
LONG = f"log 1..{REACH}"
"""The product's window."""
WINDOWS: dict[str, np.ndarray] = {
    "1..32": np.arange(1, 33),
    "1..256": np.arange(1, 257, 4),
    LONG: np.unique(np.geomspace(1, REACH, 64).astype(np.int64)),
}
"""Positions after the reference position over which the moment of queries is averaged."""


@dataclass(frozen=True)
class CacheMethod:
    """A named row; ``main`` ones are decoded freely as well. ``note`` may need calibration, so it is asked for late."""

    technique: Callable[[], Technique]
    main: bool = False
    note: Callable[[], str] = lambda: ""


class Study:
    """The model, what is known of it, and what is calibrated on training pages when a method needs it."""

    def __init__(self, device: str = "cpu") -> None:
        self.simulation = Simulation(device)
        self.product = model_metrics(self.simulation.family, self.simulation.model, self.simulation.info)
        self._taus: dict[str, list[float]] = {}

    @cached_property
    def calibration(self) -> list[PageBatch]:
        """50 training pages, whose handwriting is on none of the pages that are measured."""
        return list(batches(self.simulation, range(CALIBRATION_PAGES), "train", TAU_PAGES))

    @cached_property
    def answer_moments(self) -> list[Tensor]:
        """Second moments [1, Hkv, D, D] of each layer's queries along the answers of the calibration pages."""
        heads, moments = self.simulation.info.layers[0].kv_heads, []
        for layer in range(len(self.simulation.info.layers)):
            each = [second_moment(batch.answered[layer].query, heads) for batch in self.calibration]
            moments.append(torch.cat(each).mean(0, keepdim=True))
        return moments

    def answer_metric(self, floor: float) -> LayerMetric:
        """The metric of the queries of calibration pages, as GPTQ would have it."""
        return lambda layer: regularised(self.answer_moments[layer.index], floor)

    def product_key_metric(self, layer: Layer) -> Tensor:
        """The metric of keys that the product uses after this prompt."""
        last = torch.tensor([layer.key.shape[2] - 1], device=layer.key.device)
        cosine, sine = self.product.rotations(last)[0].unbind(1)
        return shaping.rotate(self.product.key[layer.index], cosine, sine)[None]

    def product_value_metric(self, layer: Layer) -> Tensor:
        """The metric of values that the product uses."""
        return self.product.value[layer.index].float()[None]

    def window_metric(self, window: str, offset: int, floor: float) -> LayerMetric:
        """The metric of keys from the weights: queries of white input at the positions of a window.

        The window starts ``offset`` positions before the prompt ends: then queries come that much later than it has it.
        """
        info, rotary = self.simulation.info, self.product.rotary
        remembered: dict[int, Tensor] = {}

        def metric(layer: Layer) -> Tensor:
            if layer.index not in remembered:
                weights = self.simulation.family.attention_weights(self.simulation.model, layer.index)
                query = (weights.query * weights.norm).unflatten(0, (info.query_heads, info.layers[0].head_dim))
                moment = (query @ query.transpose(1, 2)).unflatten(0, (info.layers[0].kv_heads, -1)).mean(1)
                positions = layer.key.shape[2] - 1 - offset + torch.from_numpy(WINDOWS[window]).to(layer.key.device)
                turns = rotation(rotary[0], positions)
                mean = torch.stack([shaping.rotate(moment, cosine, sine) for cosine, sine in turns]).mean(0)
                remembered[layer.index] = regularised(mean, floor)[None]
            return remembered[layer.index]

        return metric

    def value_metric(self, floor: float) -> LayerMetric:
        """W^T W of the output projection, of each KV head the mean over its query heads."""
        info = self.simulation.info

        def metric(layer: Layer) -> Tensor:
            output = self.simulation.family.attention_weights(self.simulation.model, layer.index).output
            heads = output.unflatten(1, (info.query_heads, info.layers[0].head_dim)).transpose(0, 1)
            moment = (heads.transpose(1, 2) @ heads).unflatten(0, (info.layers[0].kv_heads, -1)).mean(1)
            return regularised(moment, floor)[None]

        return metric

    def taus(self, name: str, keys: Coder, values: Coder) -> list[float]:
        """The best tau of ``affine`` for each layer on calibration pages, one layer after the other, twice."""
        if name not in self._taus:
            batch, taus = self.calibration[0], [0.0] * len(self.simulation.info.layers)

            def divergence() -> float:
                return float(self.simulation.measure(batch, combine(keys, values, affine(taus))).kl.mean())

            for layer in [*range(len(taus))] * 2:
                tried = {}
                for tau in TAUS:
                    taus[layer] = tau
                    tried[tau] = divergence()
                taus[layer] = min(tried, key=tried.__getitem__)
            self._taus[name] = taus
        return self._taus[name]


def methods(study: Study) -> dict[str, CacheMethod]:
    """All methods by name, in the order of the table."""
    key, value = {16: exact(KEYS)}, {16: exact(VALUES)}
    for bits in (1, 2):
        key[bits], value[bits] = quantized(KEYS, "lloyd", bits), quantized(VALUES, "lloyd", bits)
    return {
        **_product_methods(study, key, value),
        **_other_levels(key, value),
        **_more_bits(study, key, value),
        **_shaped_whole(study),
        **_shaped_keys(study, value[16]),
        **_shaped_values(study, key[16]),
    }


def _of(keys: Coder, values: Coder, correction: Correction | None = None, *, main: bool = False) -> CacheMethod:
    return CacheMethod(lambda: combine(keys, values, correction), main)


def _product_methods(study: Study, key: dict[int, Coder], value: dict[int, Coder]) -> dict[str, CacheMethod]:
    """What needs no metric, with its score corrections, and two corrections that the product does not have."""
    table = {"exact": _of(key[16], value[16], main=True)}
    coders = {name: (quantized(KEYS, name), quantized(VALUES, name)) for name in ("minmax", "quantile", "shrink")}
    for name, pair in coders.items():
        table[name] = _of(*pair, main=True)
    table["shrink + affine 3"] = _of(*coders["shrink"], affine([3.0] * len(study.simulation.info.layers)), main=True)
    coders["lloyd"] = key[1], value[1]
    table["lloyd"] = _of(*coders["lloyd"], main=True)
    table["lloyd keys only"] = _of(key[1], value[16])
    table["lloyd values only"] = _of(key[16], value[1])
    for name in ("shrink", "lloyd"):
        table[f"{name} + affine calibrated"] = _calibrated(study, name, *coders[name])
    for limit in (1.0, 3.0, 10.0, math.inf):
        bound = "unlimited" if math.isinf(limit) else f"{limit:g}"
        table[f"lloyd + expected {bound}"] = _of(key[1], value[1], expected(limit), main=True)
    table["lloyd keys only + expected 3"] = _of(key[1], value[16], expected(3.0))
    for limit in (3.0, math.inf):
        bound = "unlimited" if math.isinf(limit) else f"{limit:g}"
        table[f"lloyd + expected by covariance {bound}"] = _of(key[1], value[1], expected_by_covariance(limit))
    return table


def _calibrated(study: Study, name: str, keys: Coder, values: Coder) -> CacheMethod:
    def taus() -> list[float]:
        return study.taus(name, keys, values)

    return CacheMethod(
        lambda: combine(keys, values, affine(taus())), main=True, note=lambda: f"tau {' '.join(map(str, taus()))}"
    )


def _other_levels(key: dict[int, Coder], value: dict[int, Coder]) -> dict[str, CacheMethod]:
    """Other levels at 1 bit: weighted by attention, after a rotation, with the values' bias taken out."""
    by_key, by_value, unbiased = weighted(KEYS), weighted(VALUES), bias_corrected(value[1])
    table = {
        "attention-weighted keys only": _of(by_key, value[16]),
        "attention-weighted values only": _of(key[16], by_value),
        "attention-weighted": _of(by_key, by_value, main=True),
        "bias-corrected values only": _of(key[16], unbiased),
        "bias-corrected values": _of(key[1], unbiased, main=True),
    }
    for name in ("minmax", "shrink", "lloyd"):
        for centred in (False, True):
            keys, values = (rotated(which, name, centred=centred) for which in (KEYS, VALUES))
            label = f"hadamard {name}{' centred' * centred}"
            table[label] = _of(keys, values)
            if name == "lloyd" and not centred:
                table[f"{label} keys only"] = _of(keys, value[16])
                table[f"{label} values only"] = _of(key[16], values)
    return table


def _more_bits(study: Study, key: dict[int, Coder], value: dict[int, Coder]) -> dict[str, CacheMethod]:
    """Bits of keys and values apart, and of single layers."""
    table = {
        "lloyd K2 V1": _of(key[2], value[1], main=True),
        "lloyd K1 V2": _of(key[1], value[2], main=True),
        "lloyd K2 V2": _of(key[2], value[2], main=True),
        "lloyd K2 V2 + expected 3": _of(key[2], value[2], expected(3.0), main=True),
    }
    for layer in range(len(study.simulation.info.layers)):
        table[f"lloyd layer {layer} keys at 2"] = _of(by_layer(key[1], {layer: key[2]}), value[1])
        table[f"lloyd layer {layer} values at 2"] = _of(key[1], by_layer(value[1], {layer: value[2]}))
    return table


def _shaped_whole(study: Study) -> dict[str, CacheMethod]:
    """``shaped`` for keys and values with the product's metrics."""
    table = {}
    key_metric, value_metric = study.product_key_metric, study.product_value_metric
    for bits in (1, 2):
        keys, values = shaped(KEYS, key_metric, bits), shaped(VALUES, value_metric, bits)
        name = f"shaped{'' if bits == 1 else f' K{bits} V{bits}'}"
        table[name] = _of(keys, values, main=True)
        table[f"{name} + expected 3"] = _of(keys, values, expected_in_metric(key_metric, 3.0), main=True)
        if bits == 1:
            unlimited = expected_in_metric(key_metric, math.inf)
            table[f"{name} + expected unlimited"] = _of(keys, values, unlimited)
            table[f"{name} + expected by plain RMS 3"] = _of(keys, values, expected(3.0))
            table[f"{name} + expected by covariance 3"] = _of(keys, values, expected_by_covariance(3.0))
            bias = bias_corrected(values)
            table[f"{name} bias-corrected values + expected 3"] = _of(keys, bias, expected_in_metric(key_metric, 3.0))
    return table


def _shaped_keys(study: Study, values: Coder) -> dict[str, CacheMethod]:
    """Where the metric of keys comes from, how it is regularised, and how codes are found; values are exact."""
    parts: dict[str, Callable[[Layer], Tensor]] = {
        "prompt": lambda layer: layer.query,
        "text after picture": lambda layer: layer.query[:, :, layer.visual.stop :],
        "picture": lambda layer: layer.query[:, :, layer.visual],
    }
    table = {}
    for name, part in parts.items():
        table[f"shaped keys only: queries of {name}"] = _of(shaped(KEYS, prompt_metric(part, FLOOR)), values)
    for floor in (0.03, 0.1, 1.0):
        keys = shaped(KEYS, study.answer_metric(floor))
        table[f"shaped keys only: queries of {CALIBRATION_PAGES} answers floor {floor}"] = _of(keys, values)
    for window in WINDOWS:
        for offset in OFFSETS:
            keys = shaped(KEYS, study.window_metric(window, offset, FLOOR))
            table[f"shaped keys only: weights {window} offset {offset}"] = _of(keys, values)
    for floor in (0.03, 1.0):
        for offset in (0, 256):
            keys = shaped(KEYS, study.window_metric(LONG, offset, floor))
            table[f"shaped keys only: weights {LONG} offset {offset} floor {floor}"] = _of(keys, values)
    metric = study.product_key_metric
    for sweeps in (1, 2, 3, 8):
        table[f"shaped keys only: sweeps {sweeps}"] = _of(shaped(KEYS, metric, sweeps=sweeps), values)
    for step in STEPS:
        table[f"shaped keys only: step {step}"] = _of(shaped(KEYS, metric, step=step), values)
        late = shaped(KEYS, study.window_metric(LONG, 256, FLOOR), step=step)
        table[f"shaped keys only: step {step} offset 256"] = _of(late, values)
    for widening in (1.0, 1.5):
        table[f"error feedback keys only: levels x{widening}"] = _of(error_feedback(KEYS, metric, widening), values)
    return table


def _shaped_values(study: Study, keys: Coder) -> dict[str, CacheMethod]:
    """The metric of values with other floors, and other levels; keys are exact."""
    table = {}
    for floor in (0.03, 0.1, 1.0):
        values = shaped(VALUES, study.value_metric(floor))
        table[f"shaped values only: floor {floor}"] = _of(keys, values)
    for step in STEPS:
        table[f"shaped values only: step {step}"] = _of(keys, shaped(VALUES, study.value_metric(FLOOR), step=step))
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--pages", type=int, default=100, help="held-out pages (default 100)")
    parser.add_argument("--seed-start", type=int, default=5000, help="seed of the first page (default 5000)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU (default 2)")
    parser.add_argument("--only", help="methods to run, NAME,... as in the table (default: all)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each method on all pages."""
    if arguments.pages < 1:
        raise OptionError(f"--pages {arguments.pages} is not supported; give at least 1")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise DependencyError("torch finds no CUDA device; give --device cpu")
    torch.set_num_threads(arguments.threads)
    study = Study(arguments.device)
    chosen = _choose(methods(study), arguments.only)
    techniques = {name: method.technique() for name, method in chosen.items()}
    outcomes: dict[str, list[Divergence]] = {name: [] for name in chosen}
    seeds = range(arguments.seed_start, arguments.seed_start + arguments.pages)
    for number, batch in enumerate(batches(study.simulation, seeds, "test", BATCH)):
        for name, method in chosen.items():
            outcomes[name].append(study.simulation.measure(batch, techniques[name], free=method.main))
            print(f"page {number * BATCH} on: {name}: {float(outcomes[name][-1].kl.mean()):.4f}", flush=True)
    return [{**_row(name, outcomes[name]), "note": method.note()} for name, method in chosen.items()]


def _choose(table: dict[str, CacheMethod], only: str | None) -> dict[str, CacheMethod]:
    """The methods of these names. Raises OptionError for one that there is not."""
    if only is None:
        return table
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in table:
            near = difflib.get_close_matches(name, table, 3, 0.0)
            raise OptionError(f"there is no method '{name}'; give --only names of the table, such as {', '.join(near)}")
    return {name: table[name] for name in names}


def _row(name: str, outcomes: list[Divergence]) -> dict[str, Any]:
    kl = torch.cat([outcome.kl for outcome in outcomes]).double()
    error = kl.std() / math.sqrt(len(kl)) if len(kl) > 1 else torch.tensor(math.nan)
    key_bits, value_bits, bits = outcomes[0].bits

    def mean(which: str) -> float | str:
        parts = [getattr(outcome, which) for outcome in outcomes]
        return "-" if parts[0] is None else round(float(torch.cat(parts).double().mean()), 4)

    return {
        "method": name,
        "key_bits": key_bits,
        "value_bits": value_bits,
        "bits_per_element": round(bits, 3),
        "kl": round(float(kl.mean()), 5),
        "kl_standard_error": round(float(error), 5),
        "agreement": mean("agreement"),
        "digits": mean("digits"),
        "pages": mean("pages"),
        "attention_error": mean("attention_error"),
        "projected_error": mean("projected_error"),
    }
