"""Checkpoints of every family, made once, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import CASES, Case


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.preset)
def case(request: pytest.FixtureRequest) -> Case:
    """A checkpoint of the matrix."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def family_checkpoint(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in FP32."""
    from vkvx.models.presets import preset_config
    from vkvx.models.random_checkpoint import write_checkpoint

    directory = tmp_path_factory.mktemp("families") / case.preset
    write_checkpoint(directory, preset_config(case.preset), dtype="float32", seed=case.seed)
    return directory


@pytest.fixture(scope="module")
def reference(family_checkpoint: Path) -> Any:
    """Transformers' own processor and model."""
    from reference import Reference

    return Reference(family_checkpoint)


@pytest.fixture(scope="module")
def traced_towers(family_checkpoint: Path) -> Iterator[None]:
    """Both bundles of a checkpoint have the same vision tower: it is traced for the first of them only."""
    from vkvx.export import build
    from vkvx.models.graph.vision import VisionGraph

    traced, trace = list[build.Traced](), build.trace

    def once(module: Any, *arguments: Any, **options: Any) -> build.Traced:
        if not isinstance(module, VisionGraph):
            return trace(module, *arguments, **options)
        if not traced:
            first = trace(module, *arguments, **options)
            traced.append(replace(first, model=first.model.clone()))  # the export goes on with what it was given
            return first
        parameters = dict(module.named_parameters(remove_duplicate=False))
        return build.Traced(traced[0].model.clone(), {name: parameters[name] for name in traced[0].parameters})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "trace", once)
        yield


@pytest.fixture(scope="module")
def exact(family_checkpoint: Path, traced_towers: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 16 bits, which computes in FP32."""
    from vkvx import ExportOptions, export_model

    output = tmp_path_factory.mktemp("bundles") / "exact"
    export_model(family_checkpoint, output, ExportOptions(dtype="float32", bits=16))
    return output


@pytest.fixture(scope="module")
def packed(case: Case, family_checkpoint: Path, traced_towers: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 1 bit, which computes in FP32."""
    from vkvx import ExportOptions, export_model

    output = tmp_path_factory.mktemp("bundles") / "packed"
    export_model(family_checkpoint, output, ExportOptions(dtype="float32", text_bits=case.text_bits))
    return output
