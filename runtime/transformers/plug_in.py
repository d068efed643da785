"""Gives a loaded Hugging Face model the packed visual cache, in torch and without an export.

Nothing of the model is replaced: the text model is set to the attention function ``vkvx`` (``AttentionInterface``), a
forward pre-hook of the whole model tells pictures from text and hands the cache over, a forward hook ends the call.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vkvx.cache_layout import CacheLayout
from vkvx.errors import InputError, ModelError, OptionError
from vkvx.format import BASELINE_BITS
from vkvx.manifest import FLOAT_DTYPES
from vkvx.models.graph.decoder import IMPLEMENTATION, use_attention_function
from vkvx.models.graph.metric import Metrics, model_metrics
from vkvx.models.graph.moments import read_checked
from vkvx.models.pictures.base import Encoded, Sized, prompt_positions
from vkvx.models.pictures.kinds import open_pictures
from vkvx.models.registry import family_of
from vkvx.options import QuantizationOptions
from vkvx.plugins.operator import layer_attributes
from vkvx.runtime.transformers.cache import PADDING, PICTURE, TEXT, VISUAL, PackedVisualCache


def quantize_visual_cache(
    model: Any,
    bits: int = 1,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    bits_per_layer: str | None = None,
    group_size: str | int = "auto",
    quantizer: str | None = None,
    quantile_alpha: float | None = None,
    score_correction: str | None = None,
    tau: float | None = None,
    correction_limit: float | None = None,
    text_bits: int = BASELINE_BITS,
    metrics_file: str | Path | None = None,
) -> VisualCacheHandle:
    """Let ``model.generate()`` and forward calls of a transformers model keep pictures packed in their KV cache.

    Options mean what they mean in :class:`vkvx.ExportOptions` (None is the default, 16 bits the unquantised baseline).
    Lasts until :meth:`VisualCacheHandle.remove`; the result is also a context manager that removes it.

    Raises OptionError, and ModelError for a model of another class or with a trait that the cache cannot honour.
    """
    options = QuantizationOptions(
        bits=bits,
        key_bits=key_bits,
        value_bits=value_bits,
        bits_per_layer=bits_per_layer,
        group_size=group_size,
        quantizer=quantizer,
        quantile_alpha=quantile_alpha,
        score_correction=score_correction,
        tau=tau,
        correction_limit=correction_limit,
        text_bits=text_bits,
        metrics_file=metrics_file,
    )
    options.check()
    return VisualCacheHandle(model, *_prepare(model, options))


class VisualCacheHandle:
    """A model with a packed cache. Made by :func:`quantize_visual_cache`."""

    def __init__(self, model: Any, layout: CacheLayout, metrics: Metrics | None) -> None:
        self.model = model
        self.layout = layout
        self.metrics = metrics
        self._pictures: Any = open_pictures(layout.info.pictures)
        self._before_that = model.config.text_config._attn_implementation
        if self._before_that == IMPLEMENTATION:
            raise ModelError("the model has a packed cache already; remove() that first")
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        use_attention_function(model)
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._finish, with_kwargs=True, always_call=True),
        ]

    def new_cache(self) -> PackedVisualCache:
        """An empty cache to give as ``past_key_values``; without one every ``generate`` makes its own."""
        return PackedVisualCache(self.layout, self.metrics)

    def remove(self) -> None:
        """Make the model what it was. Caches made so far cannot be used without this handle's like."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.model.config.text_config._attn_implementation == IMPLEMENTATION:
            self.model.set_attn_implementation({"text_config": self._before_that})

    def __enter__(self) -> VisualCacheHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids: Tensor | None = given.get("input_ids")
        if ids is None:
            raise InputError("the packed cache tells pictures from text by input_ids; give these, not inputs_embeds")
        if given.get("output_attentions"):
            raise OptionError("the packed cache has no attention weights to return; leave out output_attentions")
        if model.training and getattr(model.config.text_config, "attention_dropout", 0.0):
            raise ModelError("the packed cache knows no attention dropout; call model.eval() first")
        past = given.get("past_key_values")
        cache = self._cache(past)
        valid = _new_part_of_mask(given.get("attention_mask"), ids, cache)
        kinds = torch.where(valid, TEXT, PADDING).to(torch.uint8)
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        lengths: list[tuple[int, ...]] = [()] * len(ids)
        if given.get("pixel_values") is not None or encoded is not None:
            lengths = self._mark_pictures(kinds, ids.cpu(), self._known_lengths(given.get("image_sizes"), encoded))
        if self.layout.info.position_rows > 1:
            # What a forward call finds by itself depends on arguments that callers may leave out. generate() keeps the
            # grids to itself, and gives the positions instead.
            known, grids = given.get("position_ids"), given.get("image_grid_thw")
            if not any(lengths) or grids is not None or known is None or known.dim() != 3:
                known = self._positions(cache, kinds, lengths, grids).to(ids.device)
            elif len(known) == 3:
                known = torch.cat([cache.positions(kinds)[None].to(ids.device), known])
            given["position_ids"] = known
        elif given.get("position_ids") is None:  # count as generate() does
            given["position_ids"] = cache.positions(kinds).to(ids.device) + family_of(model).first_position
        keep = given.get("logits_to_keep")
        if isinstance(keep, int) and keep and self.layout.info.cached_layers < len(self.layout.info.layers):
            # With a number layers that share keys see these positions alone, which the operator cannot tell.
            given["logits_to_keep"] = torch.arange(max(0, ids.shape[1] - keep), ids.shape[1], device=ids.device)
        call = cache.begin(kinds, given["position_ids"])
        use_cache = given.get("use_cache")
        if use_cache is None:
            use_cache = model.config.text_config.use_cache
        given["past_key_values"] = cache if use_cache or past is not None else None
        given["vkvx_attention"] = call
        return (), given

    def _positions(
        self, cache: PackedVisualCache, kinds: Tensor, lengths: Sequence[tuple[int, ...]], grids: Tensor | None
    ) -> Tensor:
        """INT64 [4, B, S]: the plain index, time, row and column, for pictures of these tokens and grids [P, 3]."""
        given = iter([] if grids is None else grids.tolist())
        plain = cache.positions(kinds)
        found = plain.expand(4, *plain.shape).clone()
        for row, row_lengths in enumerate(lengths):
            valid = (kinds[row] != PADDING).numpy()
            pictures = []
            for length in row_lengths:
                time, height, width = next(given, (0, 0, 0))
                positions = self._pictures.positions(height, width) if time == 1 else None
                if positions is None or positions.shape[1] != length:
                    raise InputError(f"a picture has {length} tokens in input_ids; image_grid_thw does not say so")
                pictures.append(Encoded({}, length, "", positions))
            visual = (kinds[row] >= VISUAL).numpy()[valid]
            relative = prompt_positions(visual, pictures)
            if relative is None:
                relative = np.tile(np.arange(len(visual)), (3, 1))
            found[1:, row, torch.from_numpy(valid)] = torch.from_numpy(relative).long() + cache.next_position(row)
        return found

    def _known_lengths(self, sizes: Tensor | None, encoded: Any) -> Iterator[int] | None:
        """Visual tokens of each picture of a call where its tokens do not tell: from ``image_sizes`` [P, 2], or from
        the features of the pictures, which ``generate()`` gives in place of pixels and sizes."""
        if not isinstance(self._pictures, Sized):
            return None
        if encoded is not None:
            return iter([len(features) for features in encoded.pooler_output])
        if sizes is None:
            raise InputError("pictures of this model vary in size; give image_sizes as its processor does")
        return iter([self._pictures.tokens(height, width) for height, width in torch.as_tensor(sizes).tolist()])

    def _mark_pictures(self, kinds: Tensor, ids: Tensor, known: Iterator[int] | None) -> list[tuple[int, ...]]:
        """Tell the visual tokens in kinds and tokens [B, S], and the first one of each picture, from text.

        ``known`` are the lengths of all pictures, if the tokens do not tell. Returns those of each row's pictures.
        """
        marked = []
        for row, row_ids in zip(kinds, ids, strict=True):
            valid = row_ids[row != PADDING].numpy()
            found = np.where(valid == self.layout.info.image_token_id, VISUAL, TEXT)
            if known is None:
                lengths = self._pictures.split(valid, found == VISUAL)
            else:
                lengths = _taken(known, int(np.count_nonzero(found == VISUAL)))
            first = np.cumsum((0, *lengths))[:-1]
            found[np.flatnonzero(found == VISUAL)[first]] = PICTURE
            row[row != PADDING] = torch.from_numpy(found.astype(np.uint8))
            marked.append(lengths)
        return marked

    def _finish(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = kwargs.get("vkvx_attention")
        if call is not None:
            call.cache.finish(call, succeeded=output is not None)

    def _cache(self, past: Any) -> PackedVisualCache:
        """The cache of a call: the given one, or a new one in place of the empty one that ``generate`` makes."""
        from transformers import DynamicCache

        if past is None:
            return self.new_cache()
        if isinstance(past, PackedVisualCache):
            if past.layout != self.layout:
                raise OptionError("past_key_values comes from another model or other options; give handle.new_cache()")
            return past
        own = type(past) is DynamicCache and not past.offloading and not getattr(past, "_is_user_defined", False)
        if not own or past.get_seq_length() or getattr(past, "_vkvx_replaced", False):
            raise OptionError(
                f"past_key_values of type {type(past).__name__} cannot hold packed pictures; "
                "leave it and cache_implementation out, or give handle.new_cache()"
            )
        past._vkvx_replaced = True  # whoever gives it again takes it for the history
        return self.new_cache()


def _prepare(model: Any, options: QuantizationOptions) -> tuple[CacheLayout, Metrics | None]:
    """The layout of the model's caches, and its metrics if the quantiser needs them."""
    family = family_of(model)
    config = model.config
    family.check(config)
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in FLOAT_DTYPES:
        raise ModelError(f"the model computes in {dtype}; load it with dtype {', '.join(FLOAT_DTYPES)}")
    info = family.info(config, dtype)
    quantization = options.resolve(info.cached_layers, info.typical_tokens)
    layout = CacheLayout(info, quantization)
    if not layer_attributes(quantization, 1.0)[0].needs_metrics:
        return layout, None
    moments = None if options.metrics_file is None else read_checked(options.metrics_file, info, config, warnings.warn)
    return layout, model_metrics(family, model, info, moments)


def _taken(lengths: Iterator[int], tokens: int) -> tuple[int, ...]:
    """The next pictures that have so many visual tokens together. Raises InputError if no pictures do."""
    taken: list[int] = []
    while (missing := tokens - sum(taken)) > 0:
        taken.append(next(lengths, missing + 1))
    if missing:
        raise InputError(f"{tokens} visual tokens in a row of input_ids are not those of whole pictures in image_sizes")
    return tuple(taken)


def _new_part_of_mask(mask: Tensor | None, ids: Tensor, cache: PackedVisualCache) -> Tensor:
    """BOOL [B, S] on the CPU: which new positions are tokens. Raises InputError for a mask that cannot be honoured."""
    if mask is None:
        return torch.ones(ids.shape, dtype=torch.bool)
    past = cache.get_seq_length()
    if mask.dim() != 2 or mask.shape != (ids.shape[0], past + ids.shape[1]):
        raise InputError(
            f"the attention mask has shape {list(mask.shape)}; give one of {ids.shape[0]} rows and "
            f"{past + ids.shape[1]} positions, those in the cache included"
        )
    valid = mask.bool().cpu()
    if past and valid.shape[0] == cache.batch_size and (valid[:, :past] != cache.mask).any():
        raise InputError("the attention mask hides or shows other cached tokens than before; give the same mask again")
    return valid[:, past:]
