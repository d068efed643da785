"""What else a bit or two more could buy at 1 bit: exact tokens, scales of tokens, more key bits, weighted values.

One row a method, none of them part of the product. ``needles found`` is of the case ``needle`` of the stress set,
10,000 tokens in groups of 256 and plain distance, over some draws of it. The other columns are of pages of tiny-llava,
as in ``cases.calibration``: ``kl`` with keys and values packed, ``keys at 256`` with keys alone, packed as if the
queries came 256 positions later. Bits per element count codes, padding of groups, and all numbers beside them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.cases.calibration import key_metric, value_metric
from benchmarks.lib.simulation import Dense, Layer, PageBatch, Simulation, batches
from vkvx.errors import DependencyError, OptionError
from vkvx.evaluation.stress import GROUP_SIZE
from vkvx.evaluation.stress_cases import Needles, needles
from vkvx.format import BASELINE_BITS, auto_group_size
from vkvx.models.graph.metric import model_metrics
from vkvx.plugins.reference import quantization, shaping

LATER = 256
LIMIT = 3.0
NEEDLE_TOKENS = 10_000
COUNTS = (8, 16, 32, 64)
KEY_NUMBERS, VALUE_NUMBERS = 3, 2


@dataclass(frozen=True)
class Picture:
    """A layer's keys and values of a picture in groups, [B, Hkv, G, g, D], and ``mask`` [G, g] of what is no padding.

    Metrics are [1, Hkv or 1, 1, D, D]. ``norms`` [B, G, g] by name are what tokens may be chosen by that the layer's
    own keys do not tell. ``last`` says if it is the last layer, None for a picture of no model.
    """

    key: Tensor
    value: Tensor
    mask: Tensor
    key_metric: Tensor
    value_metric: Tensor
    norms: dict[str, Tensor]
    group_size: int
    last: bool | None = None


@dataclass(frozen=True)
class Stored:
    """What is left of a picture: keys, values as there, RMS of keys [B, Hkv, G, D], exact tokens [B, Hkv, G, g].

    ``key_bits`` and ``value_bits`` are means over channels; ``beside`` counts FP16 numbers a token and KV head more.
    """

    key: Tensor
    value: Tensor
    rms: Tensor
    kept: Tensor | None = None
    key_bits: float = 1
    value_bits: float = 1
    beside: int = 0


Method = Callable[[Picture], Stored]
Choice = Callable[[Picture], Tensor]
"""What tokens are chosen by: [B, Hkv or 1, G, g], the larger the sooner."""


def bits_per_element(stored: Stored, picture: Picture) -> float:
    """As ``Dense.bits_per_element``, with exact tokens and what stands beside others."""
    tokens, channels = int(picture.mask.sum()), picture.key.shape[-1]
    kept = 0 if stored.kept is None else int(stored.kept[0, 0].sum())
    groups = -(-(tokens - kept) // picture.group_size)
    codes = groups * picture.group_size * (stored.key_bits + stored.value_bits)
    numbers = groups * (KEY_NUMBERS + VALUE_NUMBERS) + 2 * kept + stored.beside * (tokens - kept) / channels
    return (codes + 16 * numbers) / (2 * tokens)


# Methods


def packed(
    key_bits: int = 1, value_bits: int = 1, choice: Choice | None = None, count: int = 0, key_scales: bool = False
) -> Method:
    """The product's ``shaped``; ``count`` tokens chosen by ``choice`` stay exact and take no part in levels."""

    def method(picture: Picture) -> Stored:
        mask = picture.mask.expand(picture.key.shape[:-1])
        kept = None if choice is None else chosen(choice(picture), mask, count)
        rest = mask if kept is None else mask & ~kept
        size = torch.ones_like(picture.key[..., :1])
        if key_scales:
            size = picture.key.square().mean(-1, keepdim=True).sqrt().half().float()
        key = _through(picture.key / size, rest, key_bits, picture.key_metric) * size
        value = _through(picture.value, rest, value_bits, picture.value_metric)
        if kept is not None:
            key = torch.where(kept.unsqueeze(-1), picture.key, key)
            value = torch.where(kept.unsqueeze(-1), picture.value, value)
        return Stored(key, value, _rms(picture, key, rest), kept, key_bits, value_bits, int(key_scales))

    return method


def mixed(wide: Callable[[Picture], Tensor]) -> Method:
    """Two key bits in the channels that are ``wide``, BOOL [B, Hkv, G, D]; values as in the product."""

    def method(picture: Picture) -> Stored:
        mask = picture.mask.expand(picture.key.shape[:-1])
        channels = wide(picture)
        key = coordinates(picture.key, mask, picture.key_metric, 1 + channels.int())
        value = _through(picture.value, mask, 1, picture.value_metric)
        return Stored(key, value, _rms(picture, key, mask), key_bits=1 + float(channels.float().mean()))

    return method


def weighted(weight: Callable[[Picture], Tensor]) -> Method:
    """Levels and offsets of values from moments that count each token by ``weight`` [B, Hkv, G, g]."""

    def method(picture: Picture) -> Stored:
        mask = picture.mask.expand(picture.key.shape[:-1])
        key = _through(picture.key, mask, 1, picture.key_metric)
        bits = torch.ones_like(picture.value[..., 0, :], dtype=torch.int32)
        value = coordinates(picture.value, mask, picture.value_metric, bits, weight(picture))
        return Stored(key, value, _rms(picture, key, mask))

    return method


def coordinates(x: Tensor, mask: Tensor, metric: Tensor, bits: Tensor, weight: Tensor | None = None) -> Tensor:
    """What ``shaped`` leaves of x [..., n, D] with bits of each channel, int [..., D], 1 or 2, and weights of tokens.

    With one number of bits and no weights it is ``shaping.shape``, decoded.
    """
    counted = (mask if weight is None else mask * weight).float().unsqueeze(-1)
    share = counted / counted.sum(-2, keepdim=True)
    mean = (share * x).sum(-2, keepdim=True)
    deviation = (share * (x - mean).square()).sum(-2, keepdim=True).sqrt()
    step = torch.where(bits > 1, shaping.level_distance(metric, 2), shaping.level_distance(metric, 1)).unsqueeze(-2)
    top = (2.0**bits - 1).unsqueeze(-2)
    scale = (step * deviation).half().float()
    low = (mean - top / 2 * scale).half().float()
    codes = ((x - low) / scale).round().clamp(min=0).minimum(top)
    error = x - low - scale * codes
    pull = metric / metric.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    for c in range(x.shape[-1]):
        one = slice(c, c + 1)
        wish = x[..., one] - error[..., one] + error @ pull[..., c, :, None]
        code = ((wish - low[..., one]) / scale[..., one]).round().clamp(min=0).minimum(top[..., one])
        error[..., one] = x[..., one] - low[..., one] - scale[..., one] * code
        codes[..., one] = code
    shifted = (low + (share * error).sum(-2, keepdim=True)).half().float()
    return shifted + scale * codes


def chosen(value: Tensor, mask: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of a picture with the largest values [B, Hkv or 1, G, g]: BOOL [B, Hkv, G, g]."""
    flat = value.expand(mask.shape).masked_fill(~mask, -torch.inf).flatten(-2)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, flat.topk(count, -1).indices, True)
    return kept.unflatten(-1, mask.shape[-2:])


def _through(x: Tensor, mask: Tensor, bits: int, metric: Tensor) -> Tensor:
    return quantization.decode(*shaping.shape(x, mask, bits, metric))


def _rms(picture: Picture, key: Tensor, mask: Tensor) -> Tensor:
    one = torch.ones_like(key[..., 0, :], dtype=torch.float16)
    as_codes = quantization.Quantized(key, one, torch.zeros_like(one))
    return shaping.shaped_rms(picture.key, mask, as_codes, picture.key_metric)


# What tokens and channels are chosen by


def key_norm(picture: Picture) -> Tensor:
    """Norm of the keys of all KV heads of the layer."""
    return picture.key.square().sum((1, -1)).unsqueeze(1)


def key_error(picture: Picture) -> Tensor:
    """e . H e of what 1 bit leaves of the keys, each KV head by its own sum."""
    mask = picture.mask.expand(picture.key.shape[:-1])
    error = picture.key - _through(picture.key, mask, 1, picture.key_metric)
    square = ((error @ picture.key_metric) * error).sum(-1)
    return (square / (square * mask).sum((-2, -1), keepdim=True)).mean(1, keepdim=True)


def by_name(name: str) -> Choice:
    """What is known beside the layer's keys."""
    return lambda picture: picture.norms[name].unsqueeze(1)


def loudest(share: float) -> Callable[[Picture], Tensor]:
    """That share of channels: those which add most to scores, by H_cc times the variance of the group's keys."""

    def wide(picture: Picture) -> Tensor:
        valid = picture.mask.unsqueeze(-1)
        count = picture.mask.sum(-1, keepdim=True)
        mean = (picture.key * valid).sum(-2, keepdim=True) / count.unsqueeze(-1)
        variance = ((picture.key - mean) * valid).square().sum(-2) / count
        energy = variance * picture.key_metric.diagonal(dim1=-2, dim2=-1)
        return energy.argsort(-1, descending=True).argsort(-1) < share * energy.shape[-1]

    return wide


def one_head(head: int) -> Callable[[Picture], Tensor]:
    """All channels of a KV head of the last layer."""

    def wide(picture: Picture) -> Tensor:
        chosen_head = torch.zeros_like(picture.key[..., 0, :], dtype=torch.bool)
        chosen_head[:, head] = is_last(picture)
        return chosen_head

    return wide


def is_last(picture: Picture) -> bool:
    """Whether it is of the last layer. Raises LookupError for one of no model."""
    if picture.last is None:
        raise LookupError("a picture of needles has no layers")
    return picture.last


CHOICES: dict[str, Choice] = {
    "key norm": key_norm,
    "key error": key_error,
    "embedding norm": by_name("embedding"),
    "chance": by_name("chance"),
    "attention of answers": by_name("answers"),
}
"""``attention of answers`` is known only afterwards."""


def methods() -> dict[str, Method]:
    """All methods by name, in the order of the table."""
    table: dict[str, Method] = {"default": packed()}
    for name, choice in CHOICES.items():
        for count in COUNTS:
            table[f"{count} exact: {name}"] = packed(choice=choice, count=count)
    table["scale of each token, keys"] = packed(key_scales=True)
    for share in (0.125, 0.25, 0.5):
        table[f"2 key bits in {share:g} of channels"] = mixed(loudest(share))
    for head in (0, 1):
        table[f"2 key bits in head {head} of the last layer"] = mixed(one_head(head))
    table["2 key bits in the last layer"] = lambda picture: packed(1 + is_last(picture))(picture)
    table["2 bits in the last layer"] = lambda picture: packed(*[1 + is_last(picture)] * 2)(picture)
    table["2 key bits"] = packed(2)
    for name in ("prompt", "answers"):
        table[f"values weighted by attention of {name}"] = weighted(by_name(name))
    return table


# Needles


def needle_picture(drawn: Needles, device: str = "cpu") -> Picture:
    """A draw of the case as a picture of one layer and head, in groups."""
    tokens, channels = drawn.key.shape
    groups = -(-tokens // GROUP_SIZE)

    def grouped(x: Tensor) -> Tensor:
        return pad(x, (0, 0, 0, groups * GROUP_SIZE - tokens)).unflatten(0, (groups, -1))[None, None].to(device)

    mask = torch.arange(groups * GROUP_SIZE, device=device).unflatten(0, (groups, -1)) < tokens
    plain = torch.eye(channels, device=device)[None, None, None]
    chance = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))[None].to(device)
    return Picture(grouped(drawn.key), grouped(drawn.value), mask, plain, plain, {"chance": chance}, GROUP_SIZE)


def find(drawn: Needles, picture: Picture, stored: Stored) -> Tensor:
    """Which needles attention over a stored picture finds, with the correction ``expected``: BOOL [q], on the CPU.

    As ``Sequences.ask``: the step's own token has a key and a value of zeros.
    """
    key, value, kept = stored.key[0, 0], stored.value[0, 0], stored.kept
    query, scale = drawn.query.to(key.device), key.shape[-1] ** -0.5
    excess = 0.5 * scale**2 * query.square() @ stored.rms[0, 0].float().square().T
    shift = (excess / (1 + excess / LIMIT)).unsqueeze(-1).expand(-1, *picture.mask.shape)
    if kept is not None:
        shift = shift.masked_fill(kept[0, 0], 0.0)
    scores = torch.einsum("qc,gtc->qgt", query, key) * scale + shift
    scores = scores.masked_fill(~picture.mask, -torch.inf).flatten(1)
    weights = pad(scores, (0, 1)).softmax(-1)[:, :-1]
    return drawn.found((weights @ value.flatten(0, 1)).cpu())


# Pages


def page_picture(simulation: Simulation, metrics: Any, batch: PageBatch, layer: Layer, distance: int) -> Picture:
    """A layer of a batch of pages; queries come ``distance`` positions later than they do."""
    keys = layer.keys
    mask = torch.ones(1, keys.shape[2], dtype=torch.bool, device=keys.device)
    embeds, norms = batch.embeds, {}
    norms["embedding"] = embeds.norm(dim=-1)
    norms["embedding distance"] = (embeds - embeds.mean(1, keepdim=True)).norm(dim=-1)
    centred = [(one.keys - one.keys.mean(2, keepdim=True)).square().sum(-1) for one in batch.layers]
    norms["layers"] = torch.stack([x / x.sum(-1, keepdim=True) for x in centred]).mean((0, 2))
    chance = torch.rand(keys.shape[0], keys.shape[2], generator=torch.Generator().manual_seed(0))
    norms["chance"] = chance.to(keys.device)
    norms["answers"] = _answer_attention(batch, layer)
    norms["prompt"] = layer.attention_after.mean((1, 2))
    return Picture(
        keys.unsqueeze(2),
        layer.values.unsqueeze(2),
        mask,
        key_metric(metrics, distance)(layer).unsqueeze(2),
        value_metric(metrics)(layer).unsqueeze(2),
        {name: norm.unsqueeze(1) for name, norm in norms.items()},
        auto_group_size(keys.shape[2]),
        layer.index == len(batch.layers) - 1,
    )


def _answer_attention(batch: PageBatch, layer: Layer) -> Tensor:
    """What each visual token gets of the attention of the 16-bit answer, over heads: [B, n]."""
    answer = batch.answered[layer.index]
    query = answer.query.unflatten(1, (layer.key.shape[1], -1))
    key = torch.cat([layer.keys, layer.text(layer.key)], 2).unsqueeze(2)
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)[..., : layer.keys.shape[2]]
    return (weights * batch.live[:, None, None, :, None]).mean((1, 2, 3))


def dense(stored: Stored, layer: Layer, keys_only: bool) -> Dense:
    """For the simulation: one group a picture."""
    kept = None if stored.kept is None else stored.kept.squeeze(2)
    values = layer.values if keys_only else stored.value.squeeze(2)
    rms = None if keys_only else stored.rms.squeeze(2)
    return Dense(stored.key.squeeze(2), values, BASELINE_BITS, BASELINE_BITS, rms=rms, limit=LIMIT, kept=kept)


# The table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--pages", type=int, default=100, help="held-out pages, 0 for needles alone (default 100)")
    parser.add_argument("--seed-start", type=int, default=5000, help="seed of the first page (default 5000)")
    parser.add_argument("--needle-seeds", default="2,3,4,5", help="draws of the needle case (default 2,3,4,5)")
    parser.add_argument("--only", help="methods whose names have one of these parts, PART,... (default: all)")
    parser.add_argument("--batch", type=int, default=25, help="pages at a time (default 25)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU (default 2)")


def run(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Needles first, then pages; the rows so far after each batch of pages."""
    for name, least in (("pages", 0), ("batch", 1)):
        if getattr(arguments, name) < least:
            raise OptionError(f"--{name} {getattr(arguments, name)} is not supported; give at least {least}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise DependencyError("torch finds no CUDA device; give --device cpu")
    torch.set_num_threads(arguments.threads)
    parts = arguments.only.split(",") if arguments.only else [""]
    table = {name: method for name, method in methods().items() if any(part in name for part in parts)}
    if not table:
        raise OptionError(f"no method has '{arguments.only}' in its name; give --only parts of the table's names")
    rows: dict[str, dict[str, Any]] = {name: {"method": name} for name in table}
    seeds = [int(seed) for seed in arguments.needle_seeds.split(",")]
    with torch.inference_mode():
        _measure_needles(table, rows, seeds, arguments.device)
        yield list(rows.values())
        if arguments.pages:
            pages = range(arguments.seed_start, arguments.seed_start + arguments.pages)
            for _ in _measure_pages(table, rows, Simulation(arguments.device), pages, arguments.batch):
                yield list(rows.values())


def _measure_needles(
    table: dict[str, Method], rows: dict[str, dict[str, Any]], seeds: Sequence[int], device: str
) -> None:
    draws = [needles(torch.Generator().manual_seed(seed), NEEDLE_TOKENS) for seed in seeds]
    pictures = [needle_picture(drawn, device) for drawn in draws]
    for name, method in table.items():
        rows[name].update({"needle bits": "-", "needles found": "-"})
        try:
            stored = [method(picture) for picture in pictures]
        except LookupError:  # by what there is of pages only
            continue
        found = torch.cat([find(*one) for one in zip(draws, pictures, stored, strict=True)]).double()
        bits = bits_per_element(stored[0], pictures[0])
        rows[name].update({"needle bits": round(bits, 3), "needles found": round(float(found.mean()), 3)})
        print(f"needles: {name}: {bits:.3f} bits, {float(found.mean()):.3f}", flush=True)


def _measure_pages(
    table: dict[str, Method], rows: dict[str, dict[str, Any]], simulation: Simulation, seeds: range, size: int
) -> Iterator[None]:
    metrics = model_metrics(simulation.family, simulation.model, simulation.info)
    columns = {"kl": 0, f"keys at {LATER}": LATER}
    found: dict[tuple[str, str], list[Tensor]] = {}
    for batch in batches(simulation, seeds, "test", size):
        for column, distance in columns.items():
            pictures = [page_picture(simulation, metrics, batch, layer, distance) for layer in batch.layers]
            for name, method in table.items():
                stored = [method(picture) for picture in pictures]
                bits = [bits_per_element(one, picture) for one, picture in zip(stored, pictures, strict=True)]
                rows[name]["bits"] = round(sum(bits) / len(bits), 3)
                outcome = simulation.measure(batch, lambda layer: dense(stored[layer.index], layer, bool(distance)))  # noqa: B023
                found.setdefault((name, column), []).append(outcome.kl)
                kl = torch.cat(found[name, column]).double().cpu()
                rows[name][column] = round(float(kl.mean()), 5)
                rows[name][f"{column}, standard error"] = round(float(kl.std() / math.sqrt(len(kl))), 5)
                paired = kl - torch.cat(found[next(iter(table)), column]).double().cpu()
                rows[name][f"{column}, less the first"] = round(float(paired.mean()), 5)
                rows[name][f"{column}, its error"] = round(float(paired.std() / math.sqrt(len(kl))), 5)
                print(f"{len(kl)} pages: {name}: {column} {float(kl.mean()):.5f}", flush=True)
        yield
