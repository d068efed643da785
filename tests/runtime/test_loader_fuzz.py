"""A fixed number of seeded damages to each file that is read on load: typed errors of one line, or a bundle that works.

Nothing outside of the bundle is opened meanwhile, and memory stays bounded. ``docs/format.md`` says what is compared.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from mutation import mutate_graph, mutated, mutated_bytes

from vkvx import Session
from vkvx.cli import inspect
from vkvx.errors import VkvxError
from vkvx.graph_files import read_graph
from vkvx.manifest import FILE_NAME, FileInfo, Manifest
from vkvx.runtime.bundles import load_manifest
from vkvx.runtime.sessions.processor import Processor

MEMORY = 1 << 30
"""Bytes that all of a test's damages together may add to the process."""
PAGE = np.full((40, 60, 3), 200, np.uint8)
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
_LIBRARIES = tuple(
    str(Path(place).resolve()) for place in {*sysconfig.get_paths().values(), *sys.path, sys.base_prefix} if place
)
"""Where Python and packages lie, this one included."""
_SYSTEM = ("/dev/", "/proc/", "/sys/", "/etc/mime.types", "/etc/localtime", "/usr/share/zoneinfo")

Refused = Callable[[Callable[[], object]], bool]


class Watch:
    """Notes the files that are opened while it is on."""

    def __init__(self) -> None:
        self.on, self.opened = False, list[str]()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.opened.append(os.path.realpath(os.fsdecode(arguments[0])))


WATCH = Watch()
"""One: an audit hook stays for as long as the process lives."""


@pytest.fixture(scope="module")
def bundle(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose files are damaged and made whole again."""
    return Path(shutil.copytree(mixed_bundle, tmp_path_factory.mktemp("fuzz") / "bundle"))


@pytest.fixture
def refused(bundle: Path) -> Iterator[Refused]:
    """Calls something that may raise a VkvxError of one line, and nothing else; tells whether it has."""
    allowed = (f"{bundle.resolve()}{os.sep}", *_LIBRARIES, *_SYSTEM)

    def call(action: Callable[[], object]) -> bool:
        WATCH.opened.clear()
        WATCH.on = True
        try:
            action()
        except VkvxError as error:
            lines = str(error).splitlines()
            assert len(lines) == 1
            assert len(lines[0]) < 2000
            return True
        finally:
            WATCH.on = False
            assert [path for path in WATCH.opened if not path.startswith(allowed)] == []
        return False

    before = psutil.Process().memory_info().rss
    yield call
    assert psutil.Process().memory_info().rss - before < MEMORY


def choice(seed: int) -> Callable[[int], int]:
    return random.Random(seed).randrange


def inspected(directory: Path) -> None:
    """What ``vkvx inspect`` does: all of it but to print."""
    manifest = load_manifest(directory)
    inspect.parts(manifest)
    inspect.cache_costs(manifest)
    for name in manifest.graphs:
        inspect.graph_summary(read_graph(directory, manifest, name))


@pytest.mark.parametrize("damage", ["values", "text"])
def test_manifests(damage: str, bundle: Path, refused: Refused) -> None:
    path = bundle / FILE_NAME
    whole = path.read_bytes()
    data, known = json.loads(whole), 0
    try:
        for seed in range(1500):
            choose = choice(seed)
            if damage == "text":
                path.write_bytes(mutated_bytes(whole, choose))
            else:
                path.write_text(json.dumps(mutated(data, choose)))
            known += refused(lambda: load_manifest(bundle))
            if seed % 50 == 0:
                refused(lambda: inspected(bundle))
    finally:
        path.write_bytes(whole)
    assert known > 750  # most damage is noticed


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_graphs(name: str, bundle: Path, refused: Refused) -> None:
    """Ends of graphs, places of weights, and bytes."""
    manifest = Manifest.load(bundle)
    file = manifest.graphs[name].file
    path = bundle / file
    whole, known = path.read_bytes(), 0
    model = onnx.load_model_from_string(whole)
    try:
        for seed in range(200):
            choose, other = choice(seed), onnx.ModelProto()
            other.CopyFrom(model)
            mutate_graph(other, choose)
            raw = mutated_bytes(whole, choose) if seed % 4 == 0 else other.SerializeToString()
            path.write_bytes(raw)
            changed = replace(manifest, files={**manifest.files, file: FileInfo(len(raw), "0" * 64)})
            known += refused(lambda changed=changed: read_graph(bundle, changed, name))
    finally:
        path.write_bytes(whole)
    assert known > 100


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"]
)
def test_processors(name: str, bundle: Path, refused: Refused) -> None:
    """A processor that loads answers or refuses; what a template of its own does with memory is not looked at."""
    manifest = load_manifest(bundle)
    path = bundle / manifest.processor / name
    whole = path.read_bytes()

    def use() -> None:
        processor = Processor.of_bundle(bundle, manifest)
        prompt = processor.format(QUESTION) if processor.has_chat_template else "<image> What?"
        processor.decode(processor.prepare(prompt, [PAGE]).token_ids.tolist())

    assert not refused(use)
    known = 0
    try:
        for seed in range(60):
            choose = choice(seed)
            if name.endswith(".json") and seed % 4:
                path.write_text(json.dumps(mutated(json.loads(whole), choose)))
            else:
                path.write_bytes(mutated_bytes(whole, choose))
            known += refused(use)
    finally:
        path.write_bytes(whole)
    assert known > 5


def test_sessions(bundle: Path, refused: Refused) -> None:
    """Whole bundles with other manifests: what opens answers, or says why it cannot."""
    path = bundle / FILE_NAME
    whole = path.read_bytes()
    data = json.loads(whole)

    def ask() -> None:
        with Session.load(bundle, backend="onnxruntime", provider="cpu", verify=False) as session:
            session.generate("<image> What?", PAGE, max_new_tokens=1)

    assert not refused(ask)
    opened = 0
    try:
        for seed in range(400):
            path.write_text(json.dumps(mutated(data, choice(seed))))
            if opened < 5 and not refused(lambda: load_manifest(bundle)):
                refused(ask)
                opened += 1
    finally:
        path.write_bytes(whole)
    assert opened == 5
