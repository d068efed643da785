"""Simulates quantised visual caches of tiny-llava in FP32, for methods that need no packed format yet.

A picture is exact in the call that brings it, so queries, keys and values of a prompt are the same for all methods:
they are computed once. A *technique* turns a layer's visual keys and values into those that later calls see, and the
decoder runs over these: along the 16-bit answer in one causal call, or freely, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vkvx.evaluation.tasks import DIGITS_PROMPT, Sample, prompt_of
from vkvx.format import BASELINE_BITS, auto_group_size
from vkvx.models.graph.decoder import use_attention_function
from vkvx.models.graph.metric import layer_rotary
from vkvx.models.registry import resolve
from vkvx.models.tiny_llava import data
from vkvx.plugins.operator import OperatorAttributes
from vkvx.runtime.backends.torch.loading import load_model
from vkvx.runtime.sessions.processor import Processor

TOKENS = 29
"""Tokens of an answer: 24 digits, the ends of lines between them, and what begins and ends the answer."""
NEVER = -1e30


@dataclass
class Layer:
    """A layer's query [B, Hq, P, D], key and value [B, Hkv, P, D] of prompts with one picture each, FP32.

    ``memo`` is for what several techniques share.
    """

    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    visual: slice
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def keys(self) -> Tensor:
        """Visual keys [B, Hkv, n, D]."""
        return self.key[:, :, self.visual]

    @property
    def values(self) -> Tensor:
        """Visual values [B, Hkv, n, D]."""
        return self.value[:, :, self.visual]

    def text(self, x: Tensor) -> Tensor:
        """The rows of key or value that are text."""
        return torch.cat([x[:, :, : self.visual.start], x[:, :, self.visual.stop :]], 2)

    @cached_property
    def attention_after(self) -> Tensor:
        """Attention of each query head to each visual token from the prompt's text after the picture: [B, Hq, S, n]."""
        query = self.query[:, :, self.visual.stop :]
        scores = _grouped(query, self.key) * self.query.shape[-1] ** -0.5
        after, positions = scores.shape[2:]
        unseen = torch.ones(after, positions, dtype=torch.bool, device=query.device).triu(positions - after + 1)
        return scores.masked_fill(unseen, NEVER).softmax(-1)[..., self.visual]


@dataclass
class Dense:
    """What later calls see of a layer's visual cache: keys and values [B, Hkv, n, D], and how scores are corrected.

    ``rms`` [B, Hkv, D] or ``covariance`` [B, Hkv, D, D] of the residual of keys, with ``limit``, give the correction
    ``expected``, ``tau`` gives ``affine``; not of tokens that are ``kept`` exactly, BOOL [B, Hkv, n]. ``extra`` counts
    the FP16 numbers a head needs beyond the packed format.
    """

    keys: Tensor
    values: Tensor
    key_bits: int
    value_bits: int
    rms: Tensor | None = None
    covariance: Tensor | None = None
    limit: float = 3.0
    tau: float | None = None
    kept: Tensor | None = None
    extra: int = 0

    def bits_per_element(self) -> float:
        """Bits of the format an element, with padding of the group and its numbers; 16 for what is not quantised."""
        tokens, channels = self.keys.shape[-2:]
        padded = auto_group_size(tokens) / tokens
        keys, values = (
            16.0 if bits == BASELINE_BITS else bits * padded + 16 * numbers / tokens
            for bits, numbers in ((self.key_bits, 3), (self.value_bits, 2))
        )
        return (keys + values) / 2 + 16 * self.extra / (2 * tokens * channels)


Technique = Callable[[Layer], Dense]


@dataclass
class Answered:
    """A layer's query, output [B, Hq, S, D] and key, value [B, Hkv, S, D] along the 16-bit answer."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@dataclass
class PageBatch:
    """Pages, and what the 16-bit model makes of them.

    ``tokens`` INT64 [B, 29] are its greedy answers, ``live`` BOOL [B, 28] says which are fed before an answer's end,
    ``expected`` FP32 [B, 28, V] are its log-probabilities after each of them, ``answered`` has each layer's attention.
    ``embeds`` FP32 [B, n, hidden] are the embeddings of the pictures.
    """

    truths: list[str]
    layers: list[Layer]
    tokens: Tensor
    live: Tensor
    expected: Tensor
    answered: list[Answered]
    embeds: Tensor

    @property
    def positions(self) -> int:
        """Positions of the prompt."""
        return self.layers[0].key.shape[2]


@dataclass
class Divergence:
    """A method on a batch, a number per page; right digits and pages only after free decoding.

    The errors are those of the last layer's attention output, relative, for the queries of the 16-bit model: as it is,
    and behind the output projection.
    """

    kl: Tensor
    agreement: Tensor
    attention_error: Tensor
    projected_error: Tensor
    bits: tuple[float, float, float]
    digits: Tensor | None = None
    pages: Tensor | None = None


class Simulation:
    """tiny-llava in FP32 with an attention function that reads dense caches."""

    def __init__(self, device: str = "cpu") -> None:
        source = resolve("tiny-llava")
        self.family, self.device = source.family, device
        self.info = source.info("float32")
        self.model = load_model(source, torch.float32).to(device)
        self.rotary = layer_rotary(self.family, self.model)
        self.processor = Processor.of_checkpoint(source, self.info)
        use_attention_function(self.model)

    @torch.no_grad()
    def batch(self, seeds: Sequence[int], split: str, prompts: Sequence[str] = ()) -> PageBatch:
        """Prefill the pages of these seeds and answer them at 16 bits.

        Each is to be transcribed, or gets its own of ``prompts``, which must be of one length in tokens.
        """
        pages = [data.page(seed, split) for seed in seeds]
        truths = [data.transcription(page.digits) for page in pages]
        asked = prompts or [DIGITS_PROMPT] * len(pages)
        samples = [Sample(i, text, (page.image,), ()) for i, (page, text) in enumerate(zip(pages, asked, strict=True))]
        prepared = [self.processor.prepare(prompt_of(s, self.processor), s.pictures) for s in samples]
        ids = torch.stack([torch.from_numpy(p.token_ids).long() for p in prepared]).to(self.device)
        pixels = torch.cat([torch.from_numpy(call["pixel_values"]) for p in prepared for call in p.vision_calls])
        is_picture = ids == self.info.image_token_id
        first, count = int(is_picture[0].nonzero()[0]), prepared[0].picture_lengths[0]
        embeds = self.model.get_input_embeddings()(ids).clone()
        pictures = self.family.image_embeds(self.model, pixels.to(self.device))
        embeds[is_picture] = pictures
        prefill = _Prefill(len(self.info.layers), self.info.layers[0].head_dim, slice(first, first + count))
        logits = self._forward(embeds, 0, prefill)[:, -1:]
        caches = [_exact(layer) for layer in prefill.layers]
        tokens = self._free(prefill.layers, caches, logits.argmax(-1))
        ends = torch.isin(tokens[:, :-1], torch.tensor(self.info.eos_token_ids, device=self.device))
        expected, answered = self._along(prefill.layers, caches, tokens)
        pictures = pictures.reshape(len(pages), count, -1)
        return PageBatch(truths, prefill.layers, tokens, ends.cumsum(1) == 0, expected, answered, pictures)

    @torch.no_grad()
    def measure(self, batch: PageBatch, technique: Technique, *, free: bool = False) -> Divergence:
        """Run a technique along the 16-bit answers, and with ``free`` also by its own."""
        caches = [technique(layer) for layer in batch.layers]
        found, _ = self._along(batch.layers, caches, batch.tokens)
        live = batch.live.float()
        count = live.sum(1)
        divergence = (batch.expected.exp() * (batch.expected - found)).sum(-1)
        equal = (found.argmax(-1) == batch.expected.argmax(-1)).float()
        last, answer = batch.layers[-1], batch.answered[-1]
        output = _attend(answer.query, caches[-1], *_with_text(last, answer.key, answer.value))
        pair = [x.transpose(1, 2).flatten(2) for x in (output, answer.output)]
        weight = self.family.attention_weights(self.model, last.index).output
        errors = _relative_error(*pair), _relative_error(*(x @ weight.T for x in pair))
        per_page = [(x * live).sum(1) / count for x in (divergence, equal, *errors)]
        columns = [[float(c.key_bits), float(c.value_bits), c.bits_per_element()] for c in caches]
        key_bits, value_bits, bits = (sum(column) / len(caches) for column in zip(*columns, strict=True))
        outcome = Divergence(*per_page, (key_bits, value_bits, bits))
        if free:
            texts = self.texts(self._free(batch.layers, caches, batch.tokens[:, :1]))
            pairs = list(zip(texts, batch.truths, strict=True))
            outcome.digits = torch.tensor([data.right_digits(given, truth) for given, truth in pairs])
            outcome.pages = torch.tensor([float(given.strip() == truth) for given, truth in pairs])
        return outcome

    @torch.no_grad()
    def answer(self, batch: PageBatch, technique: Technique) -> Tensor:
        """Greedy tokens [B, 29] of a technique; the first one comes from the exact prefill."""
        return self._free(batch.layers, [technique(layer) for layer in batch.layers], batch.tokens[:, :1])

    def texts(self, tokens: Tensor) -> list[str]:
        """Answers as text, up to their end."""
        ends = set(self.info.eos_token_ids)
        cut = [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in tokens.tolist()]
        return [self.processor.decode(row) for row in cut]

    def _forward(self, embeds: Tensor, start: int, attention: _Prefill | _Decode) -> Tensor:
        """Logits [B, S, V] of embeddings at positions from ``start`` on."""
        positions = torch.arange(start, start + embeds.shape[1], device=self.device)[None]
        hidden = self.family.text_model(self.model)(
            inputs_embeds=embeds, position_ids=positions, use_cache=False, vkvx_attention=attention
        ).last_hidden_state
        logits = self.family.head(self.model)(hidden)
        logits[..., self.info.image_token_id] = NEVER  # as in vkvx.runtime
        return logits

    def _along(self, layers: list[Layer], caches: list[Dense], tokens: Tensor) -> tuple[Tensor, list[Answered]]:
        """Log-probabilities [B, 28, V] after each token but the last, and each layer's attention."""
        attention = _Decode(layers, caches, self.info.layers[0].head_dim)
        embeds = self.model.get_input_embeddings()(tokens[:, :-1])
        return self._forward(embeds, layers[0].key.shape[2], attention).log_softmax(-1), attention.answered

    def _free(self, layers: list[Layer], caches: list[Dense], first: Tensor) -> Tensor:
        attention = _Decode(layers, caches, self.info.layers[0].head_dim)
        tokens = [first]
        for position in range(layers[0].key.shape[2], layers[0].key.shape[2] + TOKENS - 1):
            embeds = self.model.get_input_embeddings()(tokens[-1])
            tokens.append(self._forward(embeds, position, attention).argmax(-1))
        return torch.cat(tokens, 1)


def batches(simulation: Simulation, seeds: Sequence[int], split: str, size: int) -> Iterator[PageBatch]:
    """Batches of at most ``size`` pages."""
    for start in range(0, len(seeds), size):
        yield simulation.batch(seeds[start : start + size], split)


class _Prefill:
    """Exact causal attention that keeps what each layer was given."""

    def __init__(self, layers: int, channels: int, visual: slice) -> None:
        self.attributes = [OperatorAttributes(scale=channels**-0.5)] * layers
        self.visual = visual
        self.layers: list[Layer] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.layers.append(Layer(layer, query, key, value, self.visual))
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class _Decode:
    """Attention over a dense visual cache, and over text that grows with each call."""

    def __init__(self, layers: list[Layer], caches: list[Dense], channels: int) -> None:
        self.attributes = [OperatorAttributes(scale=channels**-0.5)] * len(layers)
        self.caches = caches
        self.text = [(layer.text(layer.key), layer.text(layer.value)) for layer in layers]
        self.answered: list[Answered] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (torch.cat([old, new], 2) for old, new in zip(self.text[layer], (key, value), strict=True))
        self.text[layer] = keys, values
        output = _attend(query, self.caches[layer], keys, values)
        self.answered.append(Answered(query, key, value, output))
        return output


def _with_text(layer: Layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([layer.text(layer.key), key], 2), torch.cat([layer.text(layer.value), value], 2)


def _relative_error(found: Tensor, exact: Tensor) -> Tensor:
    """Of vectors along the last axis."""
    return torch.linalg.vector_norm(found - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """query [B, Hq, S, D] times key [B, Hkv, n, D]: [B, Hq, S, n], without a copy of the keys for each query head."""
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return (grouped @ key.transpose(-1, -2)).unflatten(2, (-1, query.shape[2])).flatten(1, 2)


def _attend(query: Tensor, cache: Dense, key: Tensor, value: Tensor) -> Tensor:
    """Attention [B, Hq, S, D] over the visual cache and text rows, of which the last S are the queries' own."""
    scale = query.shape[-1] ** -0.5
    scores = _corrected(query, _grouped(query, cache.keys) * scale, cache, scale)
    new, rows = query.shape[2], key.shape[2]
    unseen = torch.ones(new, rows, dtype=torch.bool, device=query.device).triu(rows - new + 1)
    text = (_grouped(query, key) * scale).masked_fill(unseen, NEVER)
    weights = torch.cat([scores, text], -1).softmax(-1)
    visual, rest = weights.split([scores.shape[-1], rows], -1)
    return _grouped(visual, cache.values.transpose(-1, -2)) + _grouped(rest, value.transpose(-1, -2))


def _corrected(query: Tensor, scores: Tensor, cache: Dense, scale: float) -> Tensor:
    """Score corrections as in ``docs/operator.md``, and ``expected`` with a full covariance."""
    variance = None
    heads = cache.keys.shape[1]
    if cache.rms is not None:
        variance = _grouped(query.square(), cache.rms.float().square().unsqueeze(2))
    elif cache.covariance is not None:
        grouped = query.unflatten(1, (heads, -1))
        variance = ((grouped @ cache.covariance.unsqueeze(2)) * grouped).sum(-1, keepdim=True).flatten(1, 2)
    if variance is not None:
        excess = 0.5 * scale**2 * variance
        shift = excess / (1.0 + excess / cache.limit)
        if cache.kept is not None:
            kept = cache.kept.repeat_interleave(query.shape[1] // heads, 1)
            shift = shift.expand_as(scores).masked_fill(kept.unsqueeze(2), 0.0)
        return scores + shift
    if cache.tau is not None:
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        spread = torch.where(high > low, high - low, 1.0)
        return low + (scores - low) * ((spread - cache.tau) / spread).clamp(min=0.0)
    return scores


def _exact(layer: Layer) -> Dense:
    return Dense(layer.keys, layer.values, BASELINE_BITS, BASELINE_BITS)
