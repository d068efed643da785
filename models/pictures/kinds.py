"""The kinds of pictures that a manifest may name."""

from __future__ import annotations

from vkvx.errors import BundleError
from vkvx.manifest import PictureInfo
from vkvx.models.pictures.anyres import AnyRes
from vkvx.models.pictures.base import Pictures
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


def open_pictures(info: PictureInfo) -> Pictures:
    """What a manifest describes. Raises BundleError for a kind or numbers that are not known."""
    if info.kind not in KINDS:
        raise BundleError(
            f"pictures of kind '{info.kind}' are not known to this vkvx; install a newer one, or export the model again"
        )
    if min(info.numbers.values(), default=0) < 0:
        raise BundleError("model.pictures.numbers must not be negative; export the model again")
    try:
        return KINDS[info.kind](**info.numbers, **info.marks)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest's model.pictures do not suit ({error}); export the model again") from error
