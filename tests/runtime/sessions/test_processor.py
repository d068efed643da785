"""Prompts and pictures to tokens and pixels, with the processor of the bundled model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeBackend
from fakes import manifest as fake_manifest
from PIL import Image

import vkvx.models.tiny_llava
from vkvx.errors import BundleError, CapacityError, InputError
from vkvx.manifest import FileInfo, Manifest, PictureInfo, TensorSpec
from vkvx.runtime.sessions import pictures
from vkvx.runtime.sessions.conversation import Conversation
from vkvx.runtime.sessions.pictures import load_picture
from vkvx.runtime.sessions.processor import Processor, user_message

MODEL = Path(vkvx.models.tiny_llava.__file__).parent
TOKENS = 576
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Transcribe the page."}]}]


FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")


def manifest() -> Manifest:
    base = fake_manifest()
    vision = replace(base.graphs["vision"], inputs=(TensorSpec("pixel_values", "float32", ("P", 3, 336, 336)),))
    pictures = PictureInfo("tiles", {"tile_tokens": TOKENS}, {})
    files = {f"processor/{name}": FileInfo(0, "") for name in FILES}
    graphs = {**base.graphs, "vision": vision}
    model = replace(base.model, pictures=pictures, vocab_size=512)
    return replace(base, model=model, graphs=graphs, files=base.files | files)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    (directory / "processor").mkdir()
    for name in FILES:
        shutil.copy(MODEL / name, directory / "processor")
    return directory


@pytest.fixture(scope="module")
def processor(bundle: Path) -> Processor:
    return Processor.of_bundle(bundle, manifest())


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_agrees_with_the_processor_of_transformers(bundle: Path, processor: Processor, picture: Path) -> None:
    from transformers import AutoProcessor

    theirs = AutoProcessor.from_pretrained(str(bundle / "processor"), backend="pil")
    for prompt, count in ((processor.format(QUESTION), 1), ("a <image><image>\nb", 2), ("12 <image>x", 1)):
        images = [load_picture(picture)] * count
        expected = theirs(text=prompt, images=images, return_tensors="np")
        prepared = processor.prepare(prompt, [picture] * count)
        np.testing.assert_array_equal(prepared.token_ids, expected["input_ids"][0])
        assert prepared.token_ids.dtype == np.int32
        assert prepared.picture_lengths == (TOKENS,) * count
        np.testing.assert_array_equal(prepared.vision_calls[0]["pixel_values"], expected["pixel_values"])


def test_the_sequence_begins_once(processor: Processor) -> None:
    tokenizer = processor._tokenizer
    first = processor.prepare("USER: 1").token_ids.tolist()
    assert first[0] == tokenizer.bos_token_id
    assert processor.prepare("USER: 1", first=False).token_ids.tolist() == first[1:]
    assert processor.prepare(tokenizer.bos_token + "USER: 1").token_ids.tolist() == first
    assert processor.prepare("USER: 1").vision_calls == ()


def test_the_chat_template(processor: Processor) -> None:
    assert processor.has_chat_template
    assert processor.format(QUESTION) == "USER: <image>\nTranscribe the page. ASSISTANT:"
    assert processor.format([{"role": "user", "content": "Hi"}]) == "USER: Hi ASSISTANT:"
    with pytest.raises(InputError, match="unknown role"):
        processor.format([{"role": "nobody", "content": "Hi"}])


def test_later_turns_have_their_whole_text(processor: Processor) -> None:
    talk = Conversation(FakeBackend(manifest(), 1), processor)
    talk._messages = [*QUESTION, {"role": "assistant", "content": "7"}]
    for text in ("\x02answer\x03", "\x02 7</s> \ue000\ue001", ""):
        following = talk._turn(user_message(text, 0))
        assert following == f"</s>USER: {processor.escape(text)} ASSISTANT:"


def test_without_a_chat_template(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle/processor/chat_template.jinja").unlink()
    bare = Processor.of_bundle(tmp_path / "bundle", manifest())
    assert not bare.has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        bare.format(QUESTION)


def test_text_leaves_out_special_tokens(processor: Processor) -> None:
    ids = processor.prepare("a 12</s>b").token_ids.tolist()
    assert processor.decode(ids) == "a 12b"


@pytest.mark.parametrize(("prompt", "count"), [("no place", 1), ("<image>", 0), ("<image><image>", 1), ("<image>", 2)])
def test_refuses_pictures_without_place_and_places_without_picture(
    processor: Processor, picture: Path, prompt: str, count: int
) -> None:
    with pytest.raises(InputError, match=rf"{prompt.count('<image>')} <image> and comes with {count} picture"):
        processor.prepare(prompt, [picture] * count)


def test_refuses_an_empty_turn(processor: Processor) -> None:
    with pytest.raises(InputError, match="empty"):
        processor.prepare("", first=False)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_damaged_processor_files(bundle: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle/processor" / name).write_text("{")
    with pytest.raises(BundleError, match="export the model again"):
        Processor.of_bundle(tmp_path / "bundle", manifest())


# Threads


class OneAtATime:
    """A tokenizer that fails if a second thread calls it meanwhile, and gives others the time to do so."""

    def __init__(self, tokenizer: Any) -> None:
        self._wrapped = tokenizer
        self._using = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        return partial(self._call, found) if callable(found) else found

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._call(self._wrapped, *arguments, **options)

    def _call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        assert self._using.acquire(blocking=False), "two threads at once"
        try:
            threading.Event().wait(0.002)
            return function(*arguments, **options)
        finally:
            self._using.release()


def test_threads_take_turns_at_the_tokenizer(bundle: Path) -> None:
    processor = Processor.of_bundle(bundle, manifest())
    ids = processor.prepare("USER: 12").token_ids.tolist()
    calls = [
        lambda: processor.prepare("USER: 12").token_ids.tolist(),
        lambda: processor.decode(ids),
        lambda: processor.format(QUESTION),
    ]
    expected = [call() for call in calls]
    processor._tokenizer = OneAtATime(processor._tokenizer)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: calls[number % 3](), range(60)))
    assert found == expected * 20


def test_text_that_cannot_fit_is_not_split(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens take a hundred times its memory, and all others wait for the tokenizer meanwhile."""
    processor = Processor.of_bundle(bundle, manifest())
    positions, longest = manifest().model.max_positions, max(map(len, processor._tokenizer.get_vocab()))
    word = max(processor._tokenizer.get_vocab(), key=len)
    assert len(processor.prepare("a" * positions).token_ids) > positions  # what a slot has room for is checked later
    assert processor.prepare(word * positions).token_ids.size
    monkeypatch.setattr(processor, "_tokenize", None)
    with pytest.raises(CapacityError, match=f"knows {positions} positions, and no token has more than {longest} char"):
        processor.prepare(word * positions + "a")


def test_tokens_need_not_wait_for_pictures(bundle: Path, picture: Path) -> None:
    processor = Processor.of_bundle(bundle, manifest())
    preparing, go_on = threading.Event(), threading.Event()
    process = processor._images

    def slow(**arguments: Any) -> Any:
        preparing.set()
        assert go_on.wait(60)
        return process(**arguments)

    processor._images = slow
    with ThreadPoolExecutor(2) as pool:
        prepared = pool.submit(processor.prepare, "<image> 12", [picture])
        assert preparing.wait(60)
        ids = processor.prepare("12").token_ids.tolist()
        assert pool.submit(processor.decode, ids).result(60) == "12"
        go_on.set()
        assert prepared.result(60).picture_lengths == (TOKENS,)


# Pictures


def test_pictures_become_rgb_and_upright(tmp_path: Path, picture: Path) -> None:
    assert load_picture(picture).mode == "RGB"
    for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16"):
        assert load_picture(Image.new(mode, (4, 3))).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_picture(tmp_path / "turned.jpg").size == (30, 40)


def bad_pictures(folder: Path, good: bytes) -> dict[str, Path]:
    text = folder / "text.png"
    text.write_text("not a picture")
    cut = folder / "cut.png"
    cut.write_bytes(good[: len(good) // 2])
    flipped = folder / "flipped.png"
    flipped.write_bytes(good[:200] + bytes(255 - byte for byte in good[200:400]) + good[400:])
    empty = folder / "empty.jpg"
    empty.touch()
    return {
        "text": text,
        "cut": cut,
        "flipped": flipped,
        "empty": empty,
        "missing": folder / "none.png",
        "folder": folder,
    }


@pytest.mark.parametrize("kind", ["text", "cut", "flipped", "empty", "missing", "folder"])
def test_bad_pictures_are_named(tmp_path: Path, picture: Path, kind: str) -> None:
    path = bad_pictures(tmp_path, picture.read_bytes())[kind]
    with pytest.raises(InputError) as caught:
        load_picture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    for side in (10_000, 60_000):  # above the limit at which Pillow warns, and that at which it raises
        header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
        path = tmp_path / f"{side}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        with pytest.raises(InputError, match=r"more than .* pixels"):
            load_picture(path)


def test_pictures_through_pipes(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, expected = picture.read_bytes(), load_picture(picture)
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe").write_bytes, data)
        assert load_picture(tmp_path / "pipe") == expected
    read, write = os.pipe()
    with os.fdopen(write, "wb") as source:
        source.write(data[:1000])
    with os.fdopen(read, "rb") as stream, pytest.raises(InputError, match="picture 2 cannot be read as a picture"):
        load_picture(stream, name="picture 2")
    monkeypatch.setattr(pictures, "MAX_STREAM", 100)
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe").write_bytes, data[:101])
        with pytest.raises(InputError, match="pipe gives more than 100 bytes"):
            load_picture(tmp_path / "pipe")


def test_refuses_what_is_no_picture_at_all() -> None:
    with pytest.raises(InputError, match="got int"):
        load_picture(7)  # type: ignore[arg-type]


def test_torch_is_not_needed(bundle: Path, picture: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # as if it were not installed
from pathlib import Path
sys.path[:] = {sys.path!r}
from test_processor import manifest
from vkvx.runtime.sessions.processor import Processor, user_message
prepared = Processor.of_bundle(Path({str(bundle)!r}), manifest()).prepare("<image> what", [{str(picture)!r}])
print(len(prepared.token_ids))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > TOKENS
    assert result.stderr == ""
