"""Runs a checkpoint in torch with the packed cache of :func:`vkvx.quantize_visual_cache`, setting by setting.

A batch is prefilled once: a picture is exact in the call that brings it, so keys, values and logits of the prompt are
the same in all settings. Each setting then packs these keys and values into a cache of its own and decodes twice. Once
freely, by ``generate``; once along the 16-bit answer, all its tokens in one call, because text is exact within a call
and afterwards, so the cut into calls does not matter. The second pass gives next-token distributions and, layer by
layer, the attention output to compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from vkvx.cache_layout import CacheLayout
from vkvx.errors import DependencyError
from vkvx.evaluation.histograms import worst_channels
from vkvx.evaluation.records import Record
from vkvx.evaluation.settings import FIELDS, Setting
from vkvx.evaluation.tasks import Sample, prepare
from vkvx.models.family import Source
from vkvx.models.graph.metric import Metrics
from vkvx.runtime.backends.torch.loading import load_model
from vkvx.runtime.sessions.processor import Prepared, Processor
from vkvx.runtime.transformers.cache import VISUAL, CacheCall, PackedVisualCache
from vkvx.runtime.transformers.plug_in import VisualCacheHandle, quantize_visual_cache

Observer = Callable[[CacheCall, int, Tensor, Tensor, Tensor, Tensor], None]
"""Called as observer(call, layer, query, key, value, output) after each layer's attention."""


class ObservedCache(PackedVisualCache):
    """A packed cache that shows what each layer's attention gets and gives."""

    def __init__(self, layout: CacheLayout, metrics: Metrics | None = None) -> None:
        super().__init__(layout, metrics)
        self.observer: Observer | None = None

    def visual(self, call: CacheCall) -> Tensor:
        """Which positions are those of pictures, up to the running call's last, BOOL [B, positions] on the CPU."""
        return torch.cat([self._kinds, call.kinds], 1) >= VISUAL

    def _new_call(self, kinds: Tensor, last: Tensor) -> CacheCall:
        return _ObservedCall(self, kinds, last)


class _ObservedCall(CacheCall):
    cache: ObservedCache

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = super().__call__(layer, query, key, value)
        if self.cache.observer is not None:
            self.cache.observer(self, layer, query, key, value, output)
        return output


@dataclass
class Batch:
    """Prompts of some samples, and what the 16-bit model makes of them.

    ``ids`` and ``mask`` are INT64 [B, S], padded on the left; ``kinds`` and ``positions`` are what a cache takes.
    ``first`` FP32 [B, V] are the logits after the prompt, ``prompt`` the keys and values of each attention layer,
    [B, Hkv, S, D], and ``states`` those of linear attention behind it. ``answers`` are the reference's tokens, and
    ``expected`` its log-probabilities for each of them, FP32 [tokens, V] a row. ``exact`` holds the prompt unquantised.
    """

    samples: Sequence[Sample]
    prepared: Sequence[Prepared]
    ids: Tensor
    mask: Tensor
    first: Tensor
    kinds: Tensor
    positions: Tensor
    prompt: dict[int, tuple[Tensor, Tensor]]
    states: list[list[Tensor]]
    exact: ObservedCache
    prefill_seconds: float
    reference_seconds: float = 0.0
    answers: list[list[int]] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)


class TorchRunner:
    """A loaded checkpoint, ready to be run under any setting."""

    kind = "torch"

    def __init__(self, source: Source, device: str, dtype: str, max_new_tokens: int) -> None:
        """Load the checkpoint. ``device`` is auto, cpu or cuda. Raises ModelError and DependencyError."""
        self.device = choose_device(device)
        self.dtype = dtype
        self.info = source.info(dtype)
        self.family = source.family
        self.max_new_tokens = max_new_tokens
        self.processor = Processor.of_checkpoint(source, self.info)
        self.model = load_model(source, getattr(torch, dtype)).to(self.device)
        self.model.generation_config = GenerationConfig()  # answers are greedy, whatever the checkpoint asks for

    # The reference

    def start(
        self, samples: Sequence[Sample], answers: Sequence[list[int] | None], observer: Observer | None = None
    ) -> Batch:
        """Prefill a batch and get the 16-bit answers; those that are known already are not generated again.

        An ``observer`` is shown the attention along the answers; keys and values of the prompt are not kept then.

        Raises InputError for prompts and pictures that cannot be used, CapacityError for those that are too long.
        """
        prepared = [self._prepare(sample) for sample in samples]
        width = max(len(entry.token_ids) for entry in prepared)
        ids = torch.full((len(prepared), width), self.info.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, entry in enumerate(prepared):
            ids[row, width - len(entry.token_ids) :] = torch.from_numpy(entry.token_ids)
            mask[row, width - len(entry.token_ids) :] = 1
        prompt: dict[int, tuple[Tensor, Tensor]] = {}
        begun_by: list[CacheCall] = []

        def keep(call: CacheCall, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
            if observer is None:
                prompt[layer] = (key, value)
            begun_by[:] = [call]

        ids, mask = ids.to(self.device), mask.to(self.device)
        begun = self._clock()
        with self._handle(None) as handle, torch.no_grad():
            cache = ObservedCache(handle.layout, handle.metrics)
            cache.observer = keep
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                logits_to_keep=1,
                **self._pixels(prepared),
            )
            cache.observer = None
            first = self._allowed(output.logits[:, -1].float())
            call = begun_by[0]
            assert call.positions is not None
            batch = Batch(
                *(samples, prepared, ids, mask, first, call.kinds, call.positions, prompt, cache.states(), cache),
                prefill_seconds=self._clock() - begun,
            )
            known = [answer for answer in answers if answer is not None]
            new = known if len(known) == len(answers) else self._generate(batch, cache)
            batch.reference_seconds = self._clock() - begun
            batch.answers = [old or one for old, one in zip(answers, new, strict=True)]
            batch.expected = [logits.log_softmax(-1) for logits in self._follow(batch, cache, observer=observer)]
        return batch

    def reference_records(self, batch: Batch, setting: Setting) -> list[Record]:
        """The reference's own records."""
        seconds = batch.reference_seconds / len(batch.samples)
        return [self._record(batch, row, setting, tokens, seconds) for row, tokens in enumerate(batch.answers)]

    # A setting

    def measure(
        self, batch: Batch, setting: Setting, *, generate: bool = True, histograms: bool = False
    ) -> list[Record]:
        """Run the batch under a packed setting: a record a sample. Without ``generate`` the answers stay empty."""
        layers, heads = len(self.info.attention_layers), self.info.query_heads
        errors = torch.zeros(len(batch.samples), layers, heads, 2, device=self.device)
        with self._handle(setting) as handle, torch.no_grad():
            begun = self._clock()
            cache = ObservedCache(handle.layout, handle.metrics)
            visual_index = fill(cache, batch)
            tokens = self._generate(batch, cache) if generate else None
            seconds = self._clock() - begun + batch.prefill_seconds
            layout = CacheLayout(self.info, setting.quantization)
            assert cache.visual_bytes == sum(layout.visual_bytes(p.picture_lengths) for p in batch.prepared)
            found = self._follow(batch, cache, errors)
            drawn = worst_channels(cache, batch.prompt, visual_index[0], setting.name) if histograms else None
        records = []
        share = seconds / len(batch.samples) if generate else 0.0
        for row, (expected, logits, answer) in enumerate(zip(batch.expected, found, batch.answers, strict=True)):
            given = answer if tokens is None else tokens[row]
            hits, divergence = compare(expected, logits, answer)
            records.append(
                self._record(
                    *(batch, row, setting, given, share),
                    equal=None if tokens is None else given == answer,
                    hits=hits,
                    count=len(answer),
                    kl=divergence,
                    attention=_rounded(errors[row]),
                    histograms=drawn if row == 0 else None,
                )
            )
        return records

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, as a session gives it."""
        return self.processor.decode(tokens).lstrip()

    # Parts

    def _clock(self) -> float:
        """Seconds, once the device has done its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _handle(self, setting: Setting | None) -> VisualCacheHandle:
        if setting is None:
            return quantize_visual_cache(self.model, bits=16)
        options = {name: getattr(setting.options, name) for name in FIELDS}
        # The plug-in does not see the image processor, whose limits "auto" follows.
        return quantize_visual_cache(self.model, **{**options, "group_size": setting.quantization.group_size})

    def _prepare(self, sample: Sample) -> Prepared:
        return prepare(sample, self.processor, self.info.max_positions, self.max_new_tokens)

    def _pixels(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        inputs = self.family.model_inputs(
            [entry.vision_calls for entry in prepared], [entry.picture_sizes for entry in prepared]
        )
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
        return {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in tensors.items()}

    def _allowed(self, logits: Tensor) -> Tensor:
        """Tokens of pictures without a picture mean nothing, so they are never chosen; as in :mod:`vkvx.runtime`."""
        logits[..., list(self.processor.placeholder_ids)] = -torch.inf
        return logits

    def _generate(self, batch: Batch, cache: ObservedCache) -> list[list[int]]:
        """Greedy answers after the prompt that the cache holds; afterwards it holds no more than that again."""
        first = batch.first.argmax(-1, keepdim=True)
        ends = set(self.info.eos_token_ids)
        new = first
        if self.max_new_tokens > 1 and not all(int(token) in ends for token in first):
            ids = torch.cat([batch.ids, first], 1)
            if hasattr(self.model.model, "rope_deltas"):  # of a batch before, which may have been larger
                self.model.model.rope_deltas = None
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.cat([batch.mask, torch.ones_like(first)], 1),
                past_key_values=cache,
                max_new_tokens=self.max_new_tokens - 1,
                do_sample=False,
                eos_token_id=list(ends) or None,
                pad_token_id=self.info.pad_token_id,
                suppress_tokens=list(self.processor.placeholder_ids),
            )
            new = output[:, batch.ids.shape[1] :]
            cache.rewind(cache.get_seq_length() - batch.ids.shape[1], batch.states)
        answers = []
        for row in new.tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
            answers.append(row[: end + 1])
        return answers

    def _follow(
        self, batch: Batch, cache: ObservedCache, errors: Tensor | None = None, observer: Observer | None = None
    ) -> list[Tensor]:
        """Logits FP32 [tokens, V] before each token of the reference's answers, over a cache that holds the prompt.

        ``errors`` [B, attention layers, Hq, 2] takes up squared norms of the error and of the exact attention; without
        it an ``observer`` is shown the attention.
        """
        length = max(map(len, batch.answers)) - 1  # the last token is not fed
        logits = batch.first[:, None]
        if length:
            fed = torch.full((len(batch.answers), length), self.info.pad_token_id)
            valid = torch.zeros_like(fed)
            for row, answer in enumerate(batch.answers):
                fed[row, : len(answer) - 1] = torch.tensor(answer[:-1], dtype=fed.dtype)
                valid[row, : len(answer) - 1] = 1
            mask, fed = torch.cat([batch.mask, valid.to(self.device)], 1), fed.to(self.device)
            shadow: list[CacheCall] = []

            def compare_attention(
                call: CacheCall, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor
            ) -> None:
                assert errors is not None
                if not shadow:
                    shadow.append(batch.exact.begin(call.kinds))
                exact = shadow[0](layer, query, key, value).float()
                number = self.info.attention_layers.index(layer)
                errors[:, number, :, 0] += (output.float() - exact).square().sum((2, 3))
                errors[:, number, :, 1] += exact.square().sum((2, 3))

            cache.observer = compare_attention if errors is not None else observer
            # Tokens of one call see each other both ways there.
            prefix = any(layer.visual_mask == "prefix" for layer in self.info.layers)
            step = 1 if prefix else length
            for end in range(step, length + 1, step):
                output = self.model(
                    input_ids=fed[:, end - step : end],
                    attention_mask=mask[:, : batch.ids.shape[1] + end],
                    past_key_values=cache,
                )
                if shadow:
                    batch.exact.finish(shadow.pop(), succeeded=True)
                logits = torch.cat([logits, self._allowed(output.logits.float())], 1)
            cache.observer = None
            cache.rewind(length, batch.states)
            if errors is not None:
                batch.exact.rewind(length, batch.states)
        return [logits[row, : len(answer)] for row, answer in enumerate(batch.answers)]

    def _record(
        self, batch: Batch, row: int, setting: Setting, tokens: list[int], seconds: float,
        **compared: Any,
    ) -> Record:  # fmt: skip
        layout = CacheLayout(self.info, setting.quantization)
        sample, lengths = batch.samples[row], batch.prepared[row].picture_lengths
        nothing = {"equal": None, "hits": None, "count": None, "kl": None, "attention": None}
        return Record(
            sample=sample.index,
            setting=setting.name,
            text=self.text(tokens),
            tokens=tokens,
            answers=list(sample.answers),
            visual_bytes=layout.visual_bytes(lengths),
            elements=sum(lengths) * layout.elements_per_token,
            seconds=seconds,
            **{**nothing, **compared},
        )


def fill(cache: ObservedCache, batch: Batch) -> Tensor:
    """Put the prompt's keys and values into an empty cache, which quantises those of pictures.

    Returns the positions of the visual tokens, INT32 [B, Nv], in whole groups that -1 fills up.
    """
    call = cache.begin(batch.kinds, batch.positions)
    cache.set_states(batch.states)
    for layer, (key, value) in batch.prompt.items():
        heads = cache.layout.info.query_heads
        query = key.new_zeros(1).expand(key.shape[0], heads, *key.shape[2:])  # what it would attend to is known
        call(layer, query, key, value)
    cache.finish(call, succeeded=True)
    return call.visual_index


def compare(expected: Tensor, logits: Tensor, answer: Sequence[int]) -> tuple[int, float]:
    """How many tokens of an answer are the likeliest by ``logits``, and the sum of KL(expected || logits) in nats.

    Both are FP32 [tokens, V]; ``expected`` holds log-probabilities.
    """
    found = logits.log_softmax(-1)
    hits = int((found.argmax(-1).cpu() == torch.tensor(answer)).sum())
    # What has no probability on either side adds nothing (-inf less -inf would be NaN).
    terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - found))
    return hits, max(0.0, float(terms.double().sum()))


def choose_device(name: str) -> str:
    """cpu or cuda; auto takes a GPU if there is one. Raises DependencyError."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DependencyError("torch finds no CUDA device; give device= (--device) cpu, or install torch with CUDA")
    return "cuda" if available and name != "cpu" else "cpu"


def _rounded(errors: Tensor) -> list[list[list[float]]]:
    """As a list with five digits, which is what the file of records can do with."""
    return [[[float(f"{x:.5g}") for x in pair] for pair in layer] for layer in errors.tolist()]
