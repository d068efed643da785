"""Reads where the tensors of a checkpoint lie in its safetensors files, and checks the files first. No torch here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkvx.errors import ModelError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""


@dataclass(frozen=True)
class StoredTensor:
    """``length`` bytes at ``offset`` from the start of ``file``, little-endian, row-major; ``dtype`` as in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name. Reads headers only.

    Raises ModelError if there are no safetensors files, one is truncated or damaged, or the index names what is absent.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        places = _read_index(index)
        files = {name: read_header(directory / name) for name in sorted(set(places.values()))}
        for name, file in places.items():
            if name not in files[file]:
                raise ModelError(f"{directory / file} lacks the tensor {name} that its index names; download it again")
        return {name: files[file][name] for name, file in places.items()}
    single = directory / SINGLE_FILE
    if single.is_file():
        return read_header(single)
    raise ModelError(
        f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}; "
        "download its weights, or convert other formats with save_pretrained of transformers"
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(file).name == file and file.endswith(".safetensors") for file in places.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot read {path} ({error!r}); download the checkpoint again") from error
    if not plain:
        raise ModelError(f"{path} names files outside its directory; download the checkpoint again")
    return places


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one file, once the file is known to hold every byte that its header promises."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or start > size or start > MAX_HEADER:
                raise ModelError(f"{path} is truncated or no safetensors file ({size} bytes); download it again")
            header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        tensors = {name: _read_entry(path, name, entry, start) for name, entry in header.items()}
    except FileNotFoundError:
        raise ModelError(f"{path} is missing, but the index names it; download the checkpoint again") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} has a damaged header ({error!r}); download it again") from error
    # The format wants the tensors to fill the file without gaps.
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.length)):
        if tensor.offset != end:
            raise ModelError(f"{path} has a damaged header (tensor {tensor.name} is misplaced); download it again")
        end += tensor.length
    if end != size:
        state = "truncated" if size < end else "damaged"
        raise ModelError(f"{path} is {state}: it has {size} bytes, its header describes {end}; download it again")
    return tensors


def _read_entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    shape = tuple(int(size) for size in entry["shape"])
    first, last = (int(offset) for offset in entry["data_offsets"])
    length = math.prod(shape) * ITEM_BYTES[entry["dtype"]]
    if min((0, first, *shape)) < 0 or last - first != length:
        raise ValueError(f"tensor {name} does not take the bytes that its shape needs")
    return StoredTensor(name, path, entry["dtype"], shape, start + first, length)
