"""What a model will take on a GPU, from its config alone: weights, cache, the largest batch and context."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from vkvx.cache_layout import ITEM_BYTES, CacheLayout
from vkvx.errors import CapacityError, OptionError
from vkvx.format import BASELINE_BITS
from vkvx.manifest import ModelInfo
from vkvx.models.family import Source
from vkvx.models.pictures.limits import PixelLimits
from vkvx.models.registry import resolve
from vkvx.options import QuantizationOptions, keyword
from vkvx.packages import missing

DEFAULT_BITS = (16, 4, 2, 1)
DEFAULT_RESERVE = 0.1
"""Share of the GPU's memory that is left for the driver, activations and workspaces."""
_TOKENS = keyword("tokens_per_picture")


@dataclass(frozen=True)
class PlanRow:
    """The cache at one number of bits. Bytes count all layers, keys and values, params and padding to groups.

    ``bytes_per_slot`` has the states of linear attention with it. ``max_slots`` is how many sequences of the
    planned length fit beside the weights; ``max_pictures`` how many pictures one sequence can hold; ``max_context``
    the tokens of that sequence. ``limited_by`` says what ends it: "memory" or "positions" (of the model).
    ``break_even_slots`` is the number of sequences from which a decode step reads more bytes of cache than of
    weights, so that the cache decides the speed.
    """

    bits: int
    group_size: int
    bytes_per_picture: int
    bytes_per_visual_token: float
    bytes_per_text_token: int
    bits_per_element: float
    bytes_per_slot: int
    max_slots: int
    max_pictures: int
    max_context: int
    limited_by: str
    break_even_slots: int


@dataclass(frozen=True)
class Plan:
    """A model on a GPU. Bytes of ``memory``, of the weights of the decoder and the vision tower, and of the cache."""

    model: ModelInfo
    memory: int
    reserve: int
    decoder_bytes: int
    vision_bytes: int
    tokens_per_picture: int
    pictures: int
    text_tokens: int
    rows: tuple[PlanRow, ...]

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.decoder_bytes + self.vision_bytes

    @property
    def cache(self) -> int:
        """Bytes that weights and reserve leave for the cache."""
        return self.memory - self.reserve - self.weights


def plan_model(
    name: str | Path,
    memory: int,
    *,
    dtype: str = "float16",
    options: QuantizationOptions | None = None,
    bits: tuple[int, ...] = DEFAULT_BITS,
    pictures: int = 1,
    text_tokens: int = 1024,
    tokens_per_picture: int | None = None,
    reserve: float = DEFAULT_RESERVE,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan a model for a GPU of ``memory`` bytes. Nothing but the config files of a hub model is downloaded.

    Args:
        name: as in :func:`vkvx.export_model`.
        dtype: of weights and text cache.
        options: group size, quantiser and bits of text; its bits are replaced by each of ``bits``.
        pictures, text_tokens: of one sequence.
        tokens_per_picture: where the model's pictures vary in size; by default those of a usual one.
        reserve: share of the memory that is kept free, 0 to less than 1.
        min_pixels, max_pixels: as in :class:`vkvx.ExportOptions`.
        cache_dir, revision, trust_remote_code: as in transformers.

    Raises:
        OptionError, ModelError, DependencyError: for wrong options, a model that is not known, missing packages.
        CapacityError: if the weights alone do not fit, or a sequence is longer than the model's positions.
    """
    options = options or QuantizationOptions()
    _check(bits, pictures, text_tokens, tokens_per_picture, reserve)
    settings = [options.with_bits(b) for b in bits]
    # What has no effect at 16 bits is checked by the fewest, and refused where there are no others.
    fewest = replace(options, bits=min(bits), key_bits=None, value_bits=None, bits_per_layer=None)
    for setting in (fewest, *settings):
        setting.check()
    source = resolve(
        name,
        cache_dir=cache_dir,
        revision=revision,
        trust_remote_code=trust_remote_code,
        weights=False,
    )
    source = replace(source, limits=PixelLimits(min_pixels, max_pixels))
    info = source.info(dtype)
    tokens = tokens_per_picture or info.usual_tokens
    if tokens_per_picture is not None and info.tokens_per_picture not in (None, tokens_per_picture):
        raise OptionError(f"every picture of {info.name} has {info.tokens_per_picture} tokens; leave out {_TOKENS}")
    taken = pictures * tokens + text_tokens
    if taken > info.max_positions:
        raise CapacityError(
            f"{pictures} x {tokens} visual and {text_tokens} text tokens are {taken} positions, {info.name} has "
            f"{info.max_positions}; give fewer pictures= (--pictures) or text_tokens= (--text-tokens)"
        )
    decoder, vision = (count * ITEM_BYTES[dtype] for count in count_parameters(source, dtype))
    kept = math.ceil(memory * reserve)
    free = memory - kept - decoder - vision
    if free <= 0:
        raise CapacityError(
            f"the weights of {info.name} take {(decoder + vision) / 2**30:.1f} GiB in {dtype}, which with "
            f"{kept / 2**30:.1f} GiB in reserve is more than the GPU's {memory / 2**30:.1f} GiB; "
            "give a larger memory= (--gpu-memory), or a smaller model"
        )
    rows = tuple(_row(info, setting, free, decoder, tokens, pictures, text_tokens) for setting in settings)
    return Plan(info, memory, kept, decoder, vision, tokens, pictures, text_tokens, rows)


def count_parameters(source: Source, dtype: str) -> tuple[int, int]:
    """Numbers of parameters: of the decoder with embeddings and head, and of vision tower and projector."""
    try:
        from vkvx.models.graph.skeleton import build_model
    except ImportError as error:
        raise missing("torch", error) from error
    family = source.family
    model = build_model(family.model_class(), source.config, dtype)
    decoder = {id(p): p.numel() for part in (family.text_model(model), family.head(model)) for p in part.parameters()}
    whole = {id(p): p.numel() for p in model.parameters()}
    return sum(decoder.values()), sum(count for key, count in whole.items() if key not in decoder)


def _check(
    bits: tuple[int, ...], pictures: int, text_tokens: int, tokens_per_picture: int | None, reserve: float
) -> None:
    if not bits:
        raise OptionError("no number of bits is given; give bits= (--bits) a list such as 16,4,2,1")
    if pictures < 0:
        raise OptionError(f"{keyword('pictures')} must be at least 0, got {pictures}")
    if text_tokens < 1:
        raise OptionError(f"{keyword('text_tokens')} must be at least 1, got {text_tokens}")
    if tokens_per_picture is not None and tokens_per_picture < 1:
        raise OptionError(f"{_TOKENS} must be at least 1, got {tokens_per_picture}")
    if not 0.0 <= reserve < 1.0:
        raise OptionError(f"{keyword('reserve')} must be at least 0 and less than 1, got {reserve}")


def _row(
    info: ModelInfo, options: QuantizationOptions, free: int, decoder: int, tokens: int, pictures: int, text_tokens: int
) -> PlanRow:
    quantization = options.resolve(info.cached_layers, info.typical_tokens)
    layout = CacheLayout(info, quantization)
    picture, text = layout.visual_bytes_per_picture(tokens), layout.text_bytes_per_token
    rest = text_tokens * text + layout.state_bytes
    slot = pictures * picture + rest
    by_memory = max(0, free - rest) // picture
    by_positions = max(0, info.max_positions - text_tokens) // tokens
    most = min(by_memory, by_positions)
    return PlanRow(
        bits=options.bits,
        group_size=0 if options.bits == BASELINE_BITS else quantization.group_size,
        bytes_per_picture=picture,
        bytes_per_visual_token=picture / tokens,
        bytes_per_text_token=text,
        bits_per_element=layout.bits_per_element(tokens),
        bytes_per_slot=slot,
        max_slots=free // slot,
        max_pictures=most,
        max_context=most * tokens + text_tokens,
        limited_by="memory" if by_memory < by_positions else "positions",
        break_even_slots=math.ceil(decoder / slot),
    )
