"""The decoder graph: embeds tokens, places picture embeddings, runs the text model over the packed cache, gives logits.

The text model is Hugging Face's own, unpatched: its layers call the attention function ``vkvx``, which reaches the
operator through :class:`Attention`, passed along as a keyword argument of the forward call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vkvx.errors import ModelError
from vkvx.format import CACHE_NAMES, STATE_NAMES
from vkvx.manifest import LayerInfo
from vkvx.models.family import Family
from vkvx.models.graph.linear import LinearStates, mixing
from vkvx.models.graph.metric import layer_rotary, rotations
from vkvx.plugins import torch_op  # noqa: F401 (registers the operator)
from vkvx.plugins.operator import METRIC_INPUTS, OperatorAttributes

IMPLEMENTATION = "vkvx"
BOUNDS = ("sliding_window", "softcap")
"""Keywords by which layers ask for a window and for bounded scores, and the operator's attributes of the same names."""
SINKS = "s_aux"
"""Keyword by which layers give attention sinks."""


Observer = Callable[[int, Tensor, Tensor, Tensor, Sequence[Tensor]], None]
"""Called as observer(layer, query, key, value, metrics): query [B, Hq, S, D], key and value [B, Hkv, S, D], metrics
``METRIC_INPUTS`` or none."""


class LayerAttention(Protocol):
    """What the attention function hands a layer's query, key and value to."""

    attributes: Mapping[int, OperatorAttributes] | Sequence[OperatorAttributes]
    """By layer."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of layer ``layer``: query [B, Hq, S, D], key and value [B, Hkv, S, D]; returns [B, Hq, S, D]."""


class Attention:
    """The state of one forward call: the operator's inputs that all layers share, and each layer's cache."""

    def __init__(
        self,
        attributes: Mapping[int, OperatorAttributes],
        indices: Sequence[Tensor],
        visual_count: Tensor,
        text_count: Tensor,
        caches: Sequence[Sequence[Tensor]],
        metrics: Mapping[int, Sequence[Tensor]],
        cache_of: Mapping[int, int],
        window_start: Tensor | None = None,
        in_place: bool = False,
        observer: Observer | None = None,
    ) -> None:
        """``attributes``, ``metrics`` and ``cache_of`` are those of each attention layer: ``metrics`` the operator's
        inputs ``METRIC_INPUTS``, or none, ``cache_of`` which of ``caches`` (each by ``CACHE_NAMES``) the layer reads.
        ``window_start`` is that of layers with a sliding window.

        With ``in_place`` the caches are updated as they are, otherwise ``presents`` are new ones. ``observer`` is shown
        what each layer gives.
        """
        self.observer = observer
        self.attributes = attributes
        self.in_place = in_place
        self.metrics = metrics
        self.cache_of = cache_of
        self.window_start = window_start
        self.indices = indices
        self.visual_count, self.text_count = visual_count, text_count
        self.caches = caches
        self.presents: list[Sequence[Tensor]] = [()] * len(self.caches)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of layer ``layer``: query [B, Hq, S, D], key and value [B, Hkv, S, D]; returns [B, Hq, S, D]."""
        cache, attributes = self.cache_of[layer], self.attributes[layer].to_dict()
        if self.observer is not None:
            self.observer(layer, query, key, value, self.metrics[layer])
        # A layer that reads another one's cache is given its keys and values again, and makes the same of it again.
        before = self.presents[cache] or self.caches[cache]
        visual, text = before[:4], before[4:]
        inputs = (
            *(query, key, value),
            *self.indices,
            *(*visual, self.visual_count, *text, self.text_count),
            *(self.metrics[layer] or (None,) * len(METRIC_INPUTS)),
            self.window_start if attributes["sliding_window"] else None,
        )
        if self.in_place:
            self.presents[cache] = before
            return torch.ops.vkvx.visual_kv_attention_(*inputs, **attributes)
        output, *self.presents[cache] = torch.ops.vkvx.visual_kv_attention(*inputs, **attributes)
        return output


def cache_of(layers: Sequence[LayerInfo]) -> dict[int, int]:
    """Which of the attention caches each attention layer reads: its own, or that of the layer whose keys it takes."""
    attending = [(i, layer) for i, layer in enumerate(layers) if layer.linear is None]
    own = [i for i, layer in attending if layer.keys_of is None]
    return {i: own.index(i if layer.keys_of is None else layer.keys_of) for i, layer in attending}


def use_attention_function(model: Any) -> None:
    """Let the text model of ``model`` call the attention function in each layer, with ``vkvx_attention`` given."""
    from transformers import AttentionInterface

    # No mask function is registered under this name, so transformers builds no mask.
    AttentionInterface.register(IMPLEMENTATION, attend)
    model.set_attn_implementation({"text_config": IMPLEMENTATION})


def _bounds_nothing(window: int, module: nn.Module) -> bool:
    """Whether a window is at least as long as the model's positions."""
    config: Any = module.config
    return bool(window >= config.max_position_embeddings)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What the text model calls in each layer; transformers wants [B, S, Hq, D] and the attention weights, if any."""
    attention: LayerAttention | None = kwargs.get("vkvx_attention")
    if attention is None:
        raise ModelError("the decoder was called by itself; call the whole model, or remove() its packed cache first")
    layer: int = module.layer_idx  # type: ignore[assignment]
    attributes = attention.attributes[layer]
    if kwargs["scaling"] != attributes.scale:
        raise ModelError(f"layer {layer} scales its scores by {kwargs['scaling']}, expected {attributes.scale}")
    for name in BOUNDS:
        wanted, known = kwargs.get(name) or 0, getattr(attributes, name)
        if wanted != known and not (known == 0 and name == "sliding_window" and _bounds_nothing(wanted, module)):
            raise ModelError(f"layer {layer} attends with {name} {wanted}, expected {known}")
    # Masks that show whole pictures to their tokens are made outside of the decoder, whose layers are causal.
    prefix = attributes.visual_mask == "prefix"
    if getattr(module, "is_causal", not prefix) == prefix:
        ways = ("both ways", "to earlier ones only")
        raise ModelError(f"layer {layer} has tokens attend {ways[prefix]}, expected {ways[not prefix]}")
    if kwargs.get(SINKS) is not None:
        raise ModelError(f"layer {layer} attends with {SINKS} (attention sinks), which is not supported")
    return attention(layer, query, key, value).transpose(1, 2), None


class DecoderGraph(nn.Module):
    """The decoder as one function of a call's arrays and the caches; runs eagerly and can be exported.

    ``attributes`` holds the operator's attributes of each attention layer, ``metrics`` the key and value metric of each
    cache if the quantiser needs them. ``model`` is set to the attention function ``vkvx``. With ``in_place`` the caches
    given are updated, which cannot be exported.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        attributes: Sequence[OperatorAttributes],
        metrics: Sequence[tuple[Tensor, Tensor]] = (),
        *,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        use_attention_function(model)
        self.in_place = in_place
        self.observer: Observer | None = None
        self.text_model = family.text_model(model)
        self.rotary = layer_rotary(family, model)
        layers = family.layers(model.config)
        self.cache_of = cache_of(layers)
        linear = [i for i, layer in enumerate(layers) if layer.linear is not None]
        self.linear_modules = {i: family.linear_module(model, i) for i in linear}
        # By layer, in order: how many cache tensors it has.
        sizes = {i: len(STATE_NAMES if layer.linear else CACHE_NAMES) for i, layer in enumerate(layers)}
        self.tensor_counts = {i: size for i, size in sizes.items() if layers[i].keys_of is None}
        self.head = family.head(model)
        self.first_position = family.first_position
        self.text_inputs = partial(family.text_inputs, self.text_model, model.config)
        self.finish_logits = partial(family.logits, model.config)
        self.attributes = dict(zip(self.cache_of, attributes, strict=True))
        self.packing = attributes[0]  # the same in all, but for bits
        # Parameters, so that the exporter takes them for weights.
        self.key_metrics, self.value_metrics = (
            nn.ParameterList(nn.Parameter(pair[i], requires_grad=False) for pair in metrics) for i in range(2)
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        visual_embeds: Tensor,
        visual_index: Tensor,
        text_index: Tensor,
        last_index: Tensor,
        slot: Tensor,
        visual_count: Tensor,
        text_count: Tensor,
        *caches: Tensor,
    ) -> tuple[Tensor, ...]:
        """One call, of the shapes of ``graph_specs.decoder_inputs``; gives logits [B, V] FP32, counts, caches.

        With ``in_place`` it gives logits alone, in the type of the model. Where layers have a sliding window,
        ``window_start`` comes before the caches.
        """
        window_start = None
        if any(entry.sliding_window for entry in self.attributes.values()):
            window_start, *caches = caches  # type: ignore[assignment]
        position_ids = position_ids + self.first_position if self.first_position else position_ids
        embeds = self.text_model.get_input_embeddings()(input_ids)  # type: ignore[operator]
        width = embeds.shape[-1]
        # An exported graph has to work for calls with pictures, too.
        is_text = self.in_place and not visual_index.shape[1]
        more = 0 if is_text else visual_embeds.shape[-1] - width
        if more:  # positions of text have no features for the first layers: zeros
            embeds = torch.cat([embeds, embeds.new_zeros(*embeds.shape[:2], more)], -1)
        embeds = embeds if is_text else place_embeds(embeds, visual_embeds, visual_index)
        features = [embeds[..., start : start + width] for start in range(width, width + more, width)]
        embeds = embeds[..., :width] if more else embeds
        indices, metrics = (visual_index, text_index, slot), self._metrics(position_ids, last_index, is_text)
        given = iter(caches)
        stored = {layer: list(islice(given, count)) for layer, count in self.tensor_counts.items()}
        own = [tensors for layer, tensors in stored.items() if layer not in self.linear_modules]
        attention = Attention(
            *(self.attributes, indices, visual_count, text_count, own, metrics, self.cache_of, window_start),
            in_place=self.in_place,
            observer=self.observer,
        )
        linear = self._linear_states(stored, *indices, visual_count, text_count) if self.linear_modules else None
        states = {} if linear is None else linear.presents
        # transformers wants the rows of positions first.
        rows = position_ids if position_ids.dim() == 2 else position_ids.transpose(0, 1)
        with self._adding(features), mixing(self.linear_modules, linear):
            hidden = self.text_model(
                inputs_embeds=embeds,
                position_ids=rows,
                use_cache=False,
                vkvx_attention=attention,
                **self.text_inputs(input_ids),
            ).last_hidden_state
        if not all(attention.presents) or len(states) < len(self.linear_modules):
            raise ModelError(f"not every layer of {type(self.text_model).__name__} calls the attention function")
        batch, positions, width = hidden.shape
        hidden = hidden.reshape(batch * positions, width)
        if not self.in_place or positions > 1:
            # The head is by far the largest product of a prefill: give it one position per row.
            last = torch.arange(batch, dtype=torch.int32, device=hidden.device) * positions + last_index
            hidden = hidden.index_select(0, last)
        logits = self.finish_logits(self.head(hidden))
        if self.in_place:
            return (logits,)
        logits = logits.float()
        counts = self._updated_counts(visual_index, text_index, slot, visual_count, text_count, own[0][4].shape[2])
        presents = iter(attention.presents)
        updated = (states[layer] if layer in states else next(presents) for layer in stored)
        return logits, *counts, *(tensor for present in updated for tensor in present)

    def _linear_states(
        self,
        stored: Mapping[int, Sequence[Tensor]],
        visual_index: Tensor,
        text_index: Tensor,
        slot: Tensor,
        visual_count: Tensor,
        text_count: Tensor,
    ) -> LinearStates:
        """The states of this call's layers of linear attention."""
        states = {layer: tensors for layer, tensors in stored.items() if layer in self.linear_modules}
        lengths = (text_index >= 0).sum(1, dtype=torch.int32) + (visual_index >= 0).sum(1, dtype=torch.int32)
        empty = text_count == 0
        if self.packing.is_packed:
            empty = empty & (visual_count.sum(1) == 0)
        return LinearStates(states, slot, lengths, empty, in_place=self.in_place)

    @contextmanager
    def _adding(self, features: Sequence[Tensor]) -> Iterator[None]:
        """Add features [B, S, hidden] to what the first layers give: as transformers does, but without a mask."""
        layers: Any = self.text_model.layers
        hooks = [
            layer.register_forward_hook(lambda module, args, output, more=more: output + more)
            for layer, more in zip(layers, features, strict=False)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _metrics(self, position_ids: Tensor, last_index: Tensor, is_text: bool) -> dict[int, tuple[Tensor, ...]]:
        """Metrics of each attention layer's cache, and the layer's rotation at each row's last position.

        Nothing looks at rotations in a call of text: they are zero.
        """
        if not self.key_metrics:
            return dict.fromkeys(self.attributes, ())
        # A call ends with text, which is at the same time, row and column, or is cut within a picture: at its time.
        plain = position_ids if position_ids.dim() == 2 else position_ids[:, 1]
        last = plain.gather(1, last_index.unsqueeze(1).long()).squeeze(1)
        if is_text:
            zeros = {
                one.head_dim: torch.zeros(len(last), 2, one.head_dim, device=last.device)
                for one in self.rotary.values()
            }
            turns = {layer: zeros[one.head_dim] for layer, one in self.rotary.items()}
        else:
            turns = rotations(self.rotary, last)
        return {layer: (self.key_metrics[i], self.value_metrics[i], turns[layer]) for layer, i in self.cache_of.items()}

    def _updated_counts(
        self,
        visual_index: Tensor,
        text_index: Tensor,
        slot: Tensor,
        visual_count: Tensor,
        text_count: Tensor,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        """Counts after the call. Sums over one-hot tables: idle rows and what does not fit match no entry."""
        packed, size = self.packing.is_packed, self.packing.group_size
        slots, groups = visual_count.shape
        owner = slot.unsqueeze(0) == _range(slots, slot).unsqueeze(1)  # [Bc, B]
        valid = (visual_index >= 0).int()
        new_rows = (text_index >= 0).sum(1, dtype=torch.int32)
        if packed:
            first = (visual_count > 0).sum(1, dtype=torch.int32)  # [Bc]
            row_first = (owner.int() * first.unsqueeze(1)).sum(0, dtype=torch.int32)  # [B]
            tokens = valid.unflatten(1, (-1, size)).sum(2, dtype=torch.int32)  # [B, g]
            target = row_first.unsqueeze(1) + _range(tokens.shape[1], slot)
            hit = target.unsqueeze(2) == _range(groups, slot)  # [B, g, G]
            added = (hit.int() * tokens.unsqueeze(2)).sum(1, dtype=torch.int32)  # [B, G]
            visual_count = visual_count + (owner.int().unsqueeze(2) * added.unsqueeze(0)).sum(1, dtype=torch.int32)
        else:
            visual_count = visual_count + 0  # an output must not be an input
            new_rows = new_rows + valid.sum(1, dtype=torch.int32)
        text_count = text_count + (owner.int() * new_rows.unsqueeze(0)).sum(1, dtype=torch.int32)
        return visual_count, text_count.clamp(max=rows)


def place_embeds(embeds: Tensor, visual_embeds: Tensor, visual_index: Tensor) -> Tensor:
    """Write row j of visual_embeds [B, Nv, hidden] to position visual_index[b, j] of embeds [B, S, hidden].

    Padding (-1) is written to a spare position that is cut off: a scatter would take -1 for the last one.
    """
    batch, positions, width = embeds.shape
    spare = embeds.new_zeros(batch, 1, width)
    rows = torch.cat([embeds, spare], 1).reshape(batch * (positions + 1), width)
    start = _range(batch, visual_index).unsqueeze(1) * (positions + 1)
    target = start + torch.where(visual_index < 0, positions, visual_index)
    rows = rows.index_put((target.reshape(-1).long(),), visual_embeds.reshape(-1, width))
    return rows.reshape(batch, positions + 1, width)[:, :positions]


def _range(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, dtype=torch.int32, device=like.device)
