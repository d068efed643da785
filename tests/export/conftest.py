"""A random LLaVA of two layers and 16 tokens a picture, and bundles of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vkvx import ExportOptions, export_model
from vkvx.models.random_checkpoint import preset_config, write_checkpoint


def tiny_config(**text: Any) -> Any:
    """Config of the preset ``tiny``, with other values for its decoder."""
    config = preset_config("tiny")
    for name, value in text.items():
        setattr(config.text_config, name, value)
    return config


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 weights in three shards, named as on the hub; not to be changed."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny-random"
    write_checkpoint(directory, tiny_config(), dtype="float32", shard_bytes=1_000_000)
    return directory


@pytest.fixture(scope="session")
def mixed_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP32, 8 bits in layer 0 and 1 bit in layer 1; not to be changed."""
    output = tmp_path_factory.mktemp("bundles") / "mixed"
    export_model(checkpoint, output, ExportOptions(dtype="float32", bits_per_layer="0:8"))
    return output


@pytest.fixture(scope="session")
def baseline_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP16 from FP32 weights, 16 bits, opset 17; not to be changed."""
    output = tmp_path_factory.mktemp("bundles") / "baseline"
    export_model(checkpoint, output, ExportOptions(dtype="float16", bits=16, opset=17))
    return output
