"""The kinds of pictures that a manifest may name."""

from __future__ import annotations

import reprlib

from vkvx.errors import BundleError
from vkvx.graph_specs import TensorSpec, difference, vision_outputs
from vkvx.manifest import Manifest, PictureInfo
from vkvx.models.pictures.anyres import AnyRes
from vkvx.models.pictures.grid import Grid
from vkvx.models.pictures.pooled import PooledPatches
from vkvx.models.pictures.rows import PatchRows
from vkvx.models.pictures.tiles import TileGrid, Tiles

Kind = Tiles | TileGrid | Grid | AnyRes | PatchRows | PooledPatches
KINDS: dict[str, type[Kind]] = {
    "tiles": Tiles,
    "tile grid": TileGrid,
    "grid": Grid,
    "anyres": AnyRes,
    "patch rows": PatchRows,
    "pooled patches": PooledPatches,
}


def describe(pictures: Kind) -> PictureInfo:
    """What a manifest holds of it."""
    kind = next(name for name, known in KINDS.items() if type(pictures) is known)
    fields = vars(pictures)
    numbers = {name: value for name, value in fields.items() if isinstance(value, int)}
    return PictureInfo(kind, numbers, {name: value for name, value in fields.items() if isinstance(value, str)})


def check_pictures(manifest: Manifest) -> None:
    """Raise BundleError unless the vision graph of a manifest takes and makes what its kind of pictures says."""
    model, graph, fail = manifest.model, manifest.graphs["vision"], manifest.kind.failure
    kind = open_pictures(model.pictures)
    pixels = graph.inputs[0] if graph.inputs else None
    if pixels is None or pixels.name != "pixel_values":
        raise fail(f"graphs.vision.inputs must begin with pixel_values, got {pixels}")
    wanted = TensorSpec("pixel_values", "float32", (kind.pixel_rows, *_pixel_shape(kind, pixels)))
    sides = (
        ("inputs", graph.inputs, (wanted, *kind.inputs())),
        ("outputs", graph.outputs, vision_outputs(model, kind.rows)),
    )
    for side, given, expected in sides:
        if words := difference(given, expected):
            raise fail(f"graphs.vision.{side} and model.pictures differ: {words}")
    one, every, tile = model.tokens_per_picture, set(model.typical_tokens), getattr(kind, "tile_tokens", 1)
    if one is not None and (one, every) != (tile, {tile}):
        raise fail(f"model.tokens_per_picture {one} and typical_tokens {sorted(every)} must be those of a tile, {tile}")
    if tile > model.max_positions:
        raise fail(f"a tile of {tile} tokens is longer than the model's {model.max_positions} positions")
    if one is None and isinstance(kind, Tiles) and not kind.before:
        raise fail(f"model.tokens_per_picture must be {tile}, as every picture is one tile, got null")
    if any(tokens % tile for tokens in every):
        raise fail(f"model.typical_tokens {sorted(every)} must be multiples of those of a tile, {tile}")


def _pixel_shape(kind: Kind, pixels: TensorSpec) -> tuple[int, ...]:
    """The shape of a tile or patch. What the kind of pictures leaves open is as ``pixels`` say, if these are sizes."""
    given = tuple(size if isinstance(size, int) and size > 0 else 1 for size in pixels.shape[1:])
    if isinstance(kind, PatchRows):
        return (*given[:1], kind.patch, kind.patch)
    if isinstance(kind, AnyRes):
        return (*given[:1], kind.tile_pixels, kind.tile_pixels)
    if isinstance(kind, Tiles | TileGrid):
        return (*given[:1], *given[1:2], *given[1:2])  # squares
    return given


def open_pictures(info: PictureInfo) -> Kind:
    """What a manifest describes. Raises BundleError for a kind or numbers that are not known."""
    if info.kind not in KINDS:
        raise BundleError(
            f"pictures of kind {reprlib.repr(info.kind)} are not known to this vkvx; "
            "install a newer one, or export the model again"
        )
    if min(info.numbers.values(), default=0) < 0:
        raise BundleError("model.pictures.numbers must not be negative; export the model again")
    try:
        return KINDS[info.kind](**info.numbers, **info.marks)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        words = reprlib.repr(str(error))  # which may hold what a manifest names
        raise BundleError(f"the manifest's model.pictures do not suit ({words}); export the model again") from error
