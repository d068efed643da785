"""How much an engine must take, and the optimisation profiles that follow. No TensorRT here."""

from __future__ import annotations

from dataclasses import dataclass

from vkvx.errors import CapacityError, OptionError
from vkvx.format import TILE
from vkvx.manifest import Manifest, parse_dim
from vkvx.models.pictures.kinds import open_pictures
from vkvx.runtime.engines.manifest import DECODE, DECODER, PREFILL, VISION, Limits, Profile

GIB = 1 << 30
TILES = "P"
"""Symbol of the vision graph's inputs that counts tiles, or pictures of one size."""
DEFAULT_MEMORY = 8 * GIB
"""GPU memory that is reckoned with where no GPU is seen and none is given."""
_MAX_SLOTS, _MAX_BATCH = 16, 4
_PICTURES = 4
"""Pictures that a slot holds by default, where the model's positions allow it."""
_TEXT_TOKENS, _PROMPT_TOKENS = 2048, 448
_RESERVE = 0.25
"""Share of the memory budget that stays free for activations, workspace and the CUDA context."""


@dataclass(frozen=True)
class GivenLimits:
    """The limits that somebody gave; None for those that follow from the model and ``memory``, in bytes."""

    batch_size: int | None = None
    slots: int | None = None
    input_len: int | None = None
    visual_tokens: int | None = None
    text_tokens: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        flags = {
            "--max-batch-size": self.batch_size,
            "--max-slots": self.slots,
            "--max-input-len": self.input_len,
            "--max-text-tokens": self.text_tokens,
            "--memory": self.memory,
        }
        for flag, value in flags.items():
            if value is not None and value < 1:
                raise OptionError(f"{flag} must be at least 1, got {value}")


def resolve_limits(manifest: Manifest, given: GivenLimits, weight_bytes: int, gpu_memory: int | None = None) -> Limits:
    """The limits of a bundle's engines.

    ``weight_bytes`` is what the engines' weights take, ``gpu_memory`` what the GPU at hand has. Visual tokens are
    rounded up to whole groups. Raises OptionError and CapacityError for limits that cannot hold one sequence with a
    picture, or that do not fit into the memory.
    """
    model, size = manifest.model, manifest.quantization.group_size
    picture = model.usual_tokens
    entries = -(-picture // size) * size  # of one picture, padded to groups
    tile = _smallest(manifest)
    input_len = given.input_len or min(model.max_positions, picture + _PROMPT_TOKENS)
    if input_len > model.max_positions:
        raise OptionError(
            f"--max-input-len {input_len} is more than the {model.max_positions} positions of {model.name}; give less"
        )
    least = min(tile, size)
    if input_len < least:
        raise CapacityError(
            f"--max-input-len {input_len} holds no {least} tokens of a picture, which go into one call; "
            f"give at least {least}"
        )
    pictures = max(1, min(_PICTURES, model.max_positions // picture))
    visual = pictures * entries if given.visual_tokens is None else -(-given.visual_tokens // size) * size
    smallest = -(-tile // size) * size
    if visual < smallest:
        raise CapacityError(
            f"--max-visual-tokens {given.visual_tokens} holds no picture of {tile} tokens; give at least {smallest}"
        )
    text = given.text_tokens or min(model.max_positions, _TEXT_TOKENS)
    if not manifest.layout.is_packed:  # pictures lie among the text rows
        text += (pictures * picture) if given.visual_tokens is None else given.visual_tokens
        visual = 0
    slots, batch = _rows(manifest, given, visual, text, weight_bytes, gpu_memory)
    calls = _call_groups(input_len, tile, size)
    per_call = calls * size if visual == 0 else min(calls * size, visual)
    # Tiles of all pictures share a call; a picture that is a grid of patches has its own, and may fill a prompt.
    in_tiles = has_tiles(manifest)
    pictures = per_call // (-(-tile // size) * size) if in_tiles else min(input_len, per_call)
    return Limits(batch, slots, input_len, visual, text, max(1, pictures))


def has_tiles(manifest: Manifest) -> bool:
    """Whether a call of the vision graph is for any number of tiles that do not know of each other."""
    return parse_dim(manifest.graphs["vision"].outputs[0].shape[0])[1] == TILES


def _smallest(manifest: Manifest) -> int:
    """Visual tokens of the smallest picture: those of one tile, or one."""
    return parse_dim(manifest.graphs["vision"].outputs[0].shape[0])[0]


def _call_groups(input_len: int, picture: int, size: int) -> int:
    """Groups that a call of ``input_len`` positions can hold: whole small pictures, and groups of one that is cut."""
    return -(-picture // size) * (input_len // picture + 1)


def _rows(
    manifest: Manifest, given: GivenLimits, visual: int, text: int, weight_bytes: int, gpu_memory: int | None
) -> tuple[int, int]:
    """Slots and batch size; what is not given is a power of two that fits into the memory."""
    memory = given.memory or gpu_memory or DEFAULT_MEMORY
    budget = int(memory * (1 - _RESERVE)) - weight_bytes
    slot = slot_bytes(manifest, visual, text)
    if given.slots is not None or given.batch_size is not None:
        slots = given.slots or given.batch_size or 1
    else:
        slots = 1
        while slots < _MAX_SLOTS and 2 * slots * slot <= budget:
            slots *= 2
    batch = given.batch_size or min(slots, _MAX_BATCH)
    if batch > slots:
        raise OptionError(f"--max-batch-size {batch} is more than --max-slots {slots}; give at least as many slots")
    if slots * slot > budget:
        raise CapacityError(
            f"weights of {weight_bytes / GIB:.2f} GiB and {slots} slots of {slot / GIB:.2f} GiB leave no quarter of "
            f"{memory / GIB:.2f} GiB free; give fewer --max-slots, less --max-visual-tokens or --max-text-tokens, "
            "or more --memory"
        )
    return slots, batch


def slot_bytes(manifest: Manifest, visual_tokens: int, text_tokens: int) -> int:
    """Bytes that one slot of the cache takes on the GPU."""
    groups = visual_tokens // manifest.quantization.group_size
    return groups * manifest.layout.bytes_per_group + text_tokens * manifest.layout.text_bytes_per_token


def build_profiles(manifest: Manifest, limits: Limits, *, empty_indices: bool) -> tuple[Profile, ...]:
    """The profiles prefill and decode of the decoder, and the one of the vision engine.

    Without ``empty_indices`` no size is 0: a call without pictures has a group of -1 a row, and ``text_index`` at least
    one entry. The caches' sizes may be chosen up to the limits when the engines are loaded.
    """
    size = manifest.quantization.group_size
    picture = manifest.model.usual_tokens
    entries = -(-picture // size) * size
    most = _call_groups(limits.input_len, _smallest(manifest), size) * size
    if limits.visual_tokens:
        most = min(most, limits.visual_tokens)
    least_visual, least_text = (0, 0) if empty_indices else (size, 1)
    groups = limits.visual_tokens // size
    # A cache of 16 bits has no groups at all.
    cache: dict[str, tuple[int, int, int]] = {
        "Bc": (1, limits.slots, limits.slots),
        "G": (min(1, groups), groups, groups),
        "T": (min(1, groups) * size // TILE, groups * size // TILE, groups * size // TILE),
        "N": (1, limits.text_tokens, limits.text_tokens),
    }
    prompt = min(limits.input_len, picture + 64)
    sizes = {
        PREFILL: {
            "B": (1, 1, limits.batch_size),
            "S": (1, prompt, limits.input_len),
            "Nv": (least_visual, min(entries, most), most),
            "Nt": (least_text, max(1, prompt - picture), limits.input_len),
        },
        DECODE: {
            "B": (1, limits.slots, limits.slots),
            "S": (1, 1, 1),
            "Nv": (least_visual,) * 3,
            "Nt": (1, 1, 1),
        },
    }
    specs = manifest.graphs["decoder"].inputs
    decoder = [
        Profile(DECODER, index, name, {spec.name: _shapes(spec.shape, {**cache, **ranges}) for spec in specs})
        for index, (name, ranges) in enumerate(sizes.items())
    ]
    if has_tiles(manifest):
        pictures = {TILES: (1, 1, limits.pictures)}
    else:
        kind = open_pictures(manifest.model.pictures)
        usual, largest = kind.largest(min(picture, limits.pictures)), kind.largest(limits.pictures)
        pictures = {symbol: (1, usual[symbol], size) for symbol, size in largest.items()}
    vision = {spec.name: _shapes(spec.shape, pictures) for spec in manifest.graphs["vision"].inputs}
    return (*decoder, Profile(VISION, 0, VISION, vision))


def _shapes(shape: tuple[int | str, ...], ranges: dict[str, tuple[int, int, int]]) -> tuple[tuple[int, ...], ...]:
    dims = [parse_dim(dim) for dim in shape]
    return tuple(tuple(factor * (ranges[name][i] if name else 1) for factor, name in dims) for i in range(3))
