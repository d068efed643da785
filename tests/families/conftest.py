"""Checkpoints of every family, made once, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from exports import Exports
from families import CASES, Case


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.preset)
def case(request: pytest.FixtureRequest) -> Case:
    """A checkpoint of the matrix."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def family_checkpoint(case: Case, exports: Exports) -> Path:
    """Random weights in FP32; not to be changed."""
    return exports.family(case)


@pytest.fixture(scope="module")
def reference(family_checkpoint: Path) -> Any:
    """Transformers' own processor and model."""
    from reference import Reference

    return Reference(family_checkpoint)


@pytest.fixture(scope="module")
def exact(family_checkpoint: Path, exports: Exports) -> Path:
    """A bundle of 16 bits, which computes in FP32; not to be changed."""
    return exports.bundle(family_checkpoint, dtype="float32", bits=16)


@pytest.fixture(scope="module")
def packed(case: Case, family_checkpoint: Path, exports: Exports) -> Path:
    """A bundle of 1 bit, which computes in FP32; not to be changed."""
    return exports.bundle(family_checkpoint, dtype="float32", text_bits=case.text_bits)
