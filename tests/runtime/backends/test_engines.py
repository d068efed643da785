"""Engines on a GPU, built and run by the TensorRT that is installed: the tokens and caches that onnxruntime has."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import Page

from vkvx.runtime.checks.validate import validate_bundle
from vkvx.runtime.engines.build import build_engines
from vkvx.runtime.engines.gpus import capabilities, list_gpus
from vkvx.runtime.engines.library import MODULES
from vkvx.runtime.engines.limits import GivenLimits
from vkvx.runtime.engines.options import RTX_CAPABILITIES, BuildOptions
from vkvx.runtime.sessions.session import Session

pytestmark = pytest.mark.gpu


def usable_backend() -> tuple[str | None, str]:
    """The backend whose engines this machine builds and runs, or why there is none."""
    native = capabilities(list_gpus())
    if not native:
        return None, "needs an NVIDIA GPU"
    if find_spec("cuda") is None:
        return None, "needs cuda-python"
    if find_spec(MODULES["tensorrt"]) is not None:
        return "tensorrt", ""
    if find_spec(MODULES["rtx"]) is None:
        return None, "needs tensorrt or tensorrt_rtx"
    if native[0] not in RTX_CAPABILITIES:
        return None, f"TensorRT for RTX does not run on compute capability {native[0]}"
    return "rtx", ""


@pytest.fixture(scope="module", params=[1, 2, 4, 8, 16])
def built(request: pytest.FixtureRequest, bundle_factory: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle with engines, and their backend."""
    backend, reason = usable_backend()
    if backend is None:
        pytest.skip(reason)
    bits = request.param
    options = {} if bits == 16 else {"quantizer": "lloyd"}
    bundle = Path(shutil.copytree(bundle_factory(bits=bits, **options), tmp_path_factory.mktemp("engines") / "bundle"))
    limits = GivenLimits(batch_size=2, slots=4, input_len=1280, visual_tokens=1280, text_tokens=256)
    level = 0 if backend == "tensorrt" else None
    build_engines(bundle, BuildOptions(backend=backend, limits=limits, optimization_level=level))
    return bundle, backend


def test_tokens_of_three_conversations_in_two_slots(built: tuple[Path, str], pages: list[Page]) -> None:
    bundle, name = built
    said = []
    for backend in ("onnxruntime", name):
        options = {"provider": "cpu"} if backend == "onnxruntime" else {}
        with Session.load(bundle, backend=backend, slots=2, text_tokens=200, **options) as session:
            prompt = session.format(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Transcribe the page."}]}]
            )
            found = session.generate([prompt] * 3, [page.path for page in pages[:3]], max_new_tokens=24)
            said.append([one.token_ids for one in found])
            if backend == name:
                engines: Any = session.backend
                assert engines.golden.startswith("golden sample")
                assert set(engines.graphs) == {1, 2}
                places, aliases = engines.addresses, engines.engines.manifest.aliases
                assert all(places[present] == places[past] for present, past in aliases.items())
    assert said[0] == said[1]


WAYS: list[dict[str, Any]] = [
    {"temperature": 0.8, "top_p": 0.9, "seed": 4},
    {"temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3, "logprobs": True},
]


def test_tokens_chosen_on_the_gpu(built: tuple[Path, str], pages: list[Page]) -> None:
    """Those that NumPy chooses from the engine's logits; all rows of a step run to the same end, so that engines round
    alike."""
    bundle, name = built
    found: list[Any] = []
    for on_gpu in (True, False):
        with Session.load(bundle, backend=name, slots=2, text_tokens=200) as session:
            engines: Any = session.backend
            assert engines.samples
            if not on_gpu:
                engines.sampler = None
            options = [session.options(None, {**way, "max_new_tokens": 24, "ignore_eos": True}) for way in WAYS]
            prompt = "USER: <image>\nTranscribe the page. ASSISTANT:"
            answers = session.generate([prompt] * 2, [page.path for page in pages[:2]], options=options)
            assert set(engines.graphs) == ({2} if on_gpu else set())
        found.append([one.token_ids for one in answers])
        found.append(answers[1].logprobs)
    assert found[0] == found[2]
    np.testing.assert_allclose(found[1], found[3], rtol=1e-4, atol=1e-5)


def test_validate(built: tuple[Path, str]) -> None:
    bundle, backend = built
    report = validate_bundle(bundle, backend=backend, steps=4)
    failed = [check for check in report.checks if not check.passed]
    assert not failed, failed[:3]
