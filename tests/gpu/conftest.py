"""What the tests of the CUDA kernels share: whether they can run, random packed caches, and a float64 reference."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``kernels`` need a GPU for torch and a built library."""
    marked = [item for item in items if item.get_closest_marker("kernels")]
    if not marked:
        return
    import torch

    from vkvx.plugins import build

    missing = "an NVIDIA GPU" if not torch.cuda.is_available() else None
    if missing is None and build.find_library() is None:
        missing = "the library, see `vkvx plugin build`"
    for item in marked:
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))
