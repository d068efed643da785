"""Writes a checkpoint with random weights, of any size in little memory: to measure and test exports.

    python -m vkvx.models.random_checkpoint --preset llava-1.5-7b DIRECTORY

The checkpoint has the names, shapes and sharding of those on the hub, and a small tokenizer. What
such a model says is noise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.errors import StorageError, VkvxError
from vkvx.models.checkpoint import INDEX_FILE, SINGLE_FILE
from vkvx.models.preset_processors import write_processor
from vkvx.models.presets import PRESETS, preset_config

STORED_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_BLOCK = 1 << 22
_GEMMA4 = {"put_min": -1.0, "put_max": 1.0, "layer_scalar": 0.75, "q_norm.weight": 0.15}
"""Values by the ends of names: bounds close to what they bound; norms of queries make up for a scale of 1."""
_QWEN35 = {"A_log": -3.0, "layernorm.weight": 0.1, "q_norm.weight": 0.1, "k_norm.weight": 0.1, "model.norm.weight": 0.1}
"""States that last for some tens of tokens; norms that add 1 to their weights."""
_CONSTANTS = {"gemma4": _GEMMA4, "qwen3_5": _QWEN35}
"""By model type."""


def write_checkpoint(
    directory: Path,
    config: Any,
    *,
    dtype: str = "float16",
    seed: int = 0,
    shard_bytes: int = 5 << 30,
    sparse: bool = False,
) -> int:
    """Write config, weights and processor files into a new directory; returns the bytes of the weights.

    Biases are small, norms are ones, all else is normal with variance 1/inputs: activations keep their size. With
    ``sparse`` all are zeros, in files that are holes and take no room. Raises StorageError if the directory exists.
    """
    try:
        directory.mkdir()
    except OSError as error:
        raise StorageError(f"cannot make the directory {directory}: {error.strerror}") from error
    shapes = _parameter_shapes(config)
    config.dtype = dtype
    config.save_pretrained(directory)
    write_processor(directory, config)
    item = 4 if dtype == "float32" else 2
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        length = math.prod(shape) * item
        if shards[-1] and size + length > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += length
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        sharded = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = sharded if len(shards) > 1 else SINGLE_FILE
        places |= dict.fromkeys(shard, file)
        rng = None if sparse else np.random.default_rng((seed, number))
        total += _write_shard(directory / file, shard, dtype, rng, _CONSTANTS.get(config.model_type, {}))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return total


def _parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names as on the hub, and shapes, of all parameters that a checkpoint stores."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    model.tie_weights()
    names = model.state_dict()  # which has buffers that are stored, and tied weights more than once
    stored = {name: buffer for name, buffer in model.named_buffers() if name in names}
    named = revert_weight_conversion(model, {**dict(model.named_parameters()), **stored})
    # What transformers renames by a prefix it does not turn back.
    prefixed = config.model_type == "llava" and config.vision_config.model_type == "clip_vision_model"
    clip = ("vision_tower.", "vision_tower.vision_model.") if prefixed else ("", "")
    return {name.replace(*clip): tuple(parameter.shape) for name, parameter in named.items()}


def _write_shard(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    rng: np.random.Generator | None,
    constants: Mapping[str, float],
) -> int:
    entries, end = {}, 0
    item = 4 if dtype == "float32" else 2
    for name, shape in shapes.items():
        length = math.prod(shape) * item
        entries[name] = {"dtype": STORED_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if rng is None:
            file.truncate(file.tell() + end)
            return end
        noise = rng.standard_normal(_BLOCK, np.float32)
        for name, shape in shapes.items():
            for block in _values(name, shape, noise, rng, constants):
                file.write(_to_bytes(block, dtype))
    return end


def _values(
    name: str, shape: tuple[int, ...], noise: np.ndarray, rng: np.random.Generator, constants: Mapping[str, float]
) -> Iterator[np.ndarray]:
    """Blocks of a tensor's values. The noise is drawn once and entered anywhere: billions of draws take minutes."""
    left = math.prod(shape)
    constant = next((value for end, value in constants.items() if name.endswith(end)), None)
    if constant is None and "norm" in name and name.endswith("weight"):
        constant = 1.0
    if constant is not None:
        yield np.full(left, constant, np.float32)
        return
    scale = np.float32(0.02 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:])))
    while left:
        start = int(rng.integers(_BLOCK // 2))
        block = noise[start : start + left] * scale
        left -= len(block)
        yield block


def _to_bytes(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":
        # Nearest, ties to even, as every cast to bfloat16 does.
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module."""
    parser = argparse.ArgumentParser(prog="python -m vkvx.models.random_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where to write; must not exist")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="the sizes (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="decoder layers in place of the preset's")
    parser.add_argument(
        "--dtype", choices=STORED_NAMES, default="float16", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--sparse", action="store_true", help="zeros that take no room on disk in place of weights")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        config = preset_config(options.preset, options.layers)
        total = write_checkpoint(
            options.directory, config, dtype=options.dtype, seed=options.seed, sparse=options.sparse
        )
    except VkvxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.directory}: {total / 1e9:.2f} GB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
