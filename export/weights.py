"""Brings a checkpoint's weights beside the graphs, one block at a time: copied as they are, or converted.

A graph refers to its weights by file, offset and length; safetensors files serve for that as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from vkvx.errors import ModelError
from vkvx.manifest import FileInfo
from vkvx.models.checkpoint import StoredTensor
from vkvx.models.graph.skeleton import DTYPES
from vkvx.storage import share_blocks

STORED_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_STORED_DTYPES = {**{stored: DTYPES[name] for name, stored in STORED_NAMES.items()}, "F64": torch.float64}
SHARD_BYTES = 4 << 30
_BLOCK = 8 << 20

BytesDone = Callable[[int], None]
"""Called with the number of bytes written since the last call."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the bundle."""

    file: str
    offset: int
    length: int


@dataclass
class WeightPlan:
    """What to copy and what to convert. ``shards`` lists the tensors of each new file."""

    dtype: str
    copies: list[Path] = field(default_factory=list)
    shards: list[list[StoredTensor]] = field(default_factory=list)

    def written_bytes(self, shared: bool = False) -> int:
        """Bytes to write, but for the headers of new files; with ``shared`` copies take no room."""
        item = DTYPES[self.dtype].itemsize
        converted = sum(_count(tensor.shape) * item for shard in self.shards for tensor in shard)
        return converted + (0 if shared else sum(path.stat().st_size for path in self.copies))


def match_parameters(model: Any, stored: Mapping[str, StoredTensor]) -> dict[int, StoredTensor]:
    """The stored tensor of each parameter, keyed by ``id(parameter)``; names are mapped as transformers maps them.

    Raises ModelError if a parameter is missing from the checkpoint, or has another shape or a dtype that is no float.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, StoredTensor] = {}
    for name, tensor in stored.items():
        key, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if key not in expected:
            key, converted = (name, None) if name in expected else (key, converted)
        if key not in expected:
            continue
        if converted is not None:
            raise ModelError(f"the checkpoint's {name} would have to be rearranged, which is not supported")
        if tuple(expected[key].shape) != tensor.shape:
            raise ModelError(
                f"{tensor.file} holds {name} of shape {list(tensor.shape)}, config.json asks for "
                f"{list(expected[key].shape)}; config and weights belong to different models"
            )
        if tensor.dtype not in _STORED_DTYPES:
            raise ModelError(f"{tensor.file} holds {name} as {tensor.dtype}; F16, BF16, F32 and F64 are supported")
        other = found.setdefault(id(expected[key]), tensor)
        if other is not tensor and not _same_bytes(other, tensor):
            raise ModelError(f"config.json ties {other.name} to {name}, but they differ; fix tie_word_embeddings")
    missing = [name for name, parameter in expected.items() if id(parameter) not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"the checkpoint lacks the tensor {missing[0]}{more}; download it again")
    return found


def plan_weights(tensors: Iterable[StoredTensor], dtype: str) -> WeightPlan:
    """Copy files whose tensors have the wanted dtype; gather the tensors of others into new files of some gigabytes."""
    files: dict[Path, list[StoredTensor]] = {}
    for tensor in dict.fromkeys(tensors):
        files.setdefault(tensor.file, []).append(tensor)
    plan, size, item = WeightPlan(dtype), 0, DTYPES[dtype].itemsize
    for path, members in sorted(files.items()):
        if all(tensor.dtype == STORED_NAMES[dtype] for tensor in members):
            plan.copies.append(path)
            continue
        for tensor in sorted(members, key=lambda tensor: tensor.offset):
            length = _count(tensor.shape) * item
            if not plan.shards or size + length > SHARD_BYTES:
                plan.shards.append([])
                size = 0
            plan.shards[-1].append(tensor)
            size += length
    return plan


def place_weights(
    plan: WeightPlan, tensors: Iterable[StoredTensor], directory: Path, report: BytesDone
) -> tuple[dict[StoredTensor, Place], dict[str, FileInfo]]:
    """Carry out the plan in ``directory``. Returns where each tensor lies, and size and hash of each file.

    Raises ModelError if a file is truncated, or weights leave the range of the plan's dtype; all of these are counted.
    """
    places: dict[StoredTensor, Place] = {}
    files: dict[str, FileInfo] = {}
    for path in plan.copies:
        files[path.name] = copy_file(path, directory / path.name, report)
    copied, lost = set(plan.copies), Counter[str]()
    for tensor in tensors:
        if tensor.file in copied:
            places[tensor] = Place(tensor.file.name, tensor.offset, tensor.length)
    for number, shard in enumerate(plan.shards, start=1):
        name = f"weights-{number:05}-of-{len(plan.shards):05}.safetensors"
        files[name] = _write_shard(shard, directory / name, plan.dtype, places, lost, report)
    if lost:
        raise _out_of_range(lost, plan.dtype)
    return places, files


def copy_file(source: Path, target: Path, report: BytesDone) -> FileInfo:
    """Copy a file, sharing its blocks where the file system can, and hash it."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("xb") as writer:
        shared = share_blocks(reader, writer)
        while block := reader.read(_BLOCK):
            digest.update(block)
            if not shared:
                writer.write(block)
            size += len(block)
            report(len(block))
    return FileInfo(size, digest.hexdigest())


def _write_shard(
    shard: list[StoredTensor],
    path: Path,
    dtype: str,
    places: dict[StoredTensor, Place],
    lost: Counter[str],
    report: BytesDone,
) -> FileInfo:
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for tensor in shard:
        length = _count(tensor.shape) * DTYPES[dtype].itemsize
        entries[tensor.name] = {
            "dtype": STORED_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + length],
        }
        end += length
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 64)
    start = 8 + len(header)
    digest = hashlib.sha256()
    with path.open("xb") as writer:
        for block in (len(header).to_bytes(8, "little"), header):
            digest.update(block)
            writer.write(block)
        for tensor in shard:
            first, last = entries[tensor.name]["data_offsets"]
            places[tensor] = Place(path.name, start + first, last - first)
            for block in _converted(tensor, DTYPES[dtype], lost):
                digest.update(block)
                writer.write(block)
                report(len(block))
    return FileInfo(start + end, digest.hexdigest())


def load_tensor(tensor: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """A stored tensor in memory, converted. Raises ModelError if its file is truncated or ``dtype`` cannot hold it."""
    lost = Counter[str]()
    values = bytearray(b"".join(_converted(tensor, dtype, lost)))
    if lost:
        raise _out_of_range(lost, str(dtype).removeprefix("torch."))
    return torch.frombuffer(values, dtype=dtype).reshape(tensor.shape)


def _converted(tensor: StoredTensor, dtype: torch.dtype, lost: Counter[str]) -> Iterable[bytes]:
    """The tensor's bytes in another dtype, block by block. Counts in ``lost`` what becomes infinite by that."""
    stored = _STORED_DTYPES[tensor.dtype]
    with tensor.file.open("rb") as reader:
        reader.seek(tensor.offset)
        left = tensor.length
        while left:
            block = bytearray(reader.read(min(left, _BLOCK)))
            if not block:
                raise ModelError(f"{tensor.file} ends within the tensor {tensor.name}; download it again")
            left -= len(block)
            values = torch.frombuffer(block, dtype=stored)
            result = values.to(dtype)
            # The extremes take a thirtieth of the time that a count takes. Infinite ones need not be what got lost.
            is_finite = all(map(isfinite, torch.stack(torch.aminmax(result)).tolist()))
            if not is_finite and (count := int((result.isinf() & values.isfinite()).sum())):
                lost[tensor.name] += count
            yield result.view(torch.uint8).numpy().tobytes()


def _out_of_range(lost: Counter[str], dtype: str) -> ModelError:
    """Lost are weights by the names of their tensors."""
    name, most = lost.most_common(1)[0]
    count, others = sum(lost.values()), len(lost) - 1
    where = f"{name} ({most:,}) and {others} other tensor{'' if others == 1 else 's'}" if others else name
    return ModelError(
        f"{count:,} weight{' is' if count == 1 else 's are'} beyond the range of {dtype}, which ends at "
        f"{torch.finfo(DTYPES[dtype]).max:.6g}, in {where}; give --dtype bfloat16 or float32"
    )


def _same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.dtype, a.length) != (b.dtype, b.length):
        return False
    with a.file.open("rb") as one, b.file.open("rb") as two:
        one.seek(a.offset)
        two.seek(b.offset)
        sizes = [_BLOCK] * (a.length // _BLOCK) + [a.length % _BLOCK]
        return all(one.read(size) == two.read(size) for size in sizes)


def _count(shape: Iterable[int]) -> int:
    return torch.Size(shape).numel()
