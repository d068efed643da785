"""Videos from the command line: files through PyAV, folders of frames, and what is refused."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import CASES
from PIL import Image
from reference import picture

from vkvx import Session
from vkvx.errors import CapacityError, InputError
from vkvx.models.preset_processors import write_processor
from vkvx.models.presets import preset_config
from vkvx.models.registry import resolve
from vkvx.runtime.sessions.processor import Processor
from vkvx.runtime.sessions.videos import open_clip

FRAMES = [picture(160, 96, seed) for seed in range(8)]
RATE = 4


@pytest.fixture(scope="module")
def bundle(exports: Any) -> Path:
    """Qwen3-VL at 1 bit, which takes two frames a second."""
    (case,) = (case for case in CASES if case.preset == "tiny-qwen3-vl")
    path: Path = exports.bundle(exports.family(case), dtype="float32")
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of MPEG-4."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as pictures, in a folder with other things."""
    path = tmp_path_factory.mktemp("frames")
    for number, frame in enumerate(FRAMES):
        frame.save(path / f"{number:03}.png")
    (path / "about.txt").write_text("frames")
    return path


def test_frames_of_a_file(film: Path, folder: Path) -> None:
    clip, pictures = open_clip(film), open_clip(folder, RATE)
    assert (clip.total, clip.rate, clip.height, clip.width) == (8, 4.0, 96, 160)
    assert (pictures.total, pictures.rate, pictures.height, pictures.width) == (8, 4.0, 96, 160)
    indices = np.array([0, 3, 3, 7])
    for frame, other in zip(clip.frames(indices), pictures.frames(indices), strict=True):
        difference = np.abs(np.asarray(frame, np.int16) - np.asarray(other, np.int16))
        assert frame.size == (160, 96)
        assert difference.mean() < 12  # the codec loses some; frames of noise differ by 60


def run(cli: Callable[..., Any], *arguments: object) -> dict[str, Any]:
    result = cli("run", *arguments, "--max-new-tokens", "2", "--json")
    assert result.code == 0, result.err
    return dict(json.loads(result.out))


def test_run(cli: Callable[..., Any], bundle: Path, film: Path, folder: Path) -> None:
    found = run(cli, bundle, "What happens?", "--video", film)
    assert (found["frames"], found["visual_tokens"]) == (4, 30)
    assert run(cli, bundle, "What happens?", "--video", folder, "--fps", RATE)["visual_tokens"] == 30
    assert run(cli, bundle, "What happens?", "--video", film, "--fps", "4")["frames"] == 8
    mixed = run(cli, bundle, "Is <image> in <video>?", "--video", film, "--image", folder / "000.png")
    assert mixed["visual_tokens"] == 45
    plain = cli("run", bundle, "What happens?", "--video", film, "--max-new-tokens", "2")
    assert "4 frames of video" in plain.err.splitlines()[1]


def test_chat(cli: Callable[..., Any], bundle: Path, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"/video {film}", "What happens?", "/video nowhere.mp4", "And then?", "/stats"]
    monkeypatch.setattr("vkvx.cli.chat._lines", lambda: iter(lines))
    result = cli("chat", bundle, "--max-new-tokens", "2")
    assert result.code == 2  # of a pipe, where a video was missing
    assert "video of 8 frames of 160 x 96 pixels goes with the next message" in result.err
    assert "error: no video at nowhere.mp4" in result.err
    assert "30 visual tokens" in result.out


@pytest.fixture
def refused(cli: Callable[..., Any], bundle: Path) -> Callable[..., str]:
    """Run with a video that is refused; returns the line."""

    def call(*arguments: object, at: Path = bundle) -> str:
        result = cli("run", at, "What?", *arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.count("\n") == 1, result.err
        return str(result.err)

    return call


def test_wrong_input(refused: Callable[..., str], folder: Path, film: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "empty").mkdir()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(film.read_bytes()[:2000])
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, size in enumerate(((64, 64), (64, 96))):
        Image.new("RGB", size).save(mixed / f"{number}.png")
    for arguments, words in (
        (("--video", tmp_path / "none.mp4"), "no video at"),
        (("--video", tmp_path / "text.mp4"), "cannot be read as a video"),
        (("--video", cut), "cannot be read as a video"),
        (("--video", tmp_path / "sound.wav"), "has no video stream"),
        (("--video", tmp_path / "empty"), "holds no frames"),
        (("--video", mixed, "--fps", 2), "give frames of one size"),
        (("--video", folder), "with fps= (--fps)"),
        (("--video", film, "--fps", 0), "fps (--fps) must be a positive number"),
        (("--video", film, "--max-visual-tokens", 1), "raise visual_tokens= (--max-visual-tokens)"),
        (("--fps", 2), "no effect without a video"),
        (("--max-pixels", 5000, "--video", film), "no effect without a picture"),
        (("--raw-prompt", "--video", film), "the prompt has 0 <video> and comes with 1 video;"),
    ):
        assert words in refused(*arguments)


def test_videos_that_are_too_long(tmp_path: Path) -> None:
    """Told before the frames are read: those behind the first are no pictures."""
    config = preset_config("tiny-qwen2-vl")
    config.save_pretrained(tmp_path)
    write_processor(tmp_path, config)
    source = resolve(tmp_path, weights=False)
    processor = Processor.of_checkpoint(source, source.info("float32"))
    film = tmp_path / "film"
    film.mkdir()
    Image.new("RGB", (1280, 960)).save(film / "0000.png")
    for number in range(1, 100):
        (film / f"{number:04}.png").touch()
    with pytest.raises(CapacityError, match=r"100 frames of .* make 61500 visual tokens, the model knows 4096"):
        processor.prepare("<video>What?", videos=[film])


def test_models_without_videos(refused: Callable[..., str], tiny_bundle: Path, folder: Path) -> None:
    assert "takes no videos; give some of the frames as pictures" in refused("--video", folder, at=tiny_bundle)


def test_without_pyav(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return load(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("vkvx.packages._is_there", lambda module: module != "av")
    (tmp_path / "film.mp4").touch()
    line = refused("--video", tmp_path / "film.mp4")
    assert "the Python package 'av' is missing; run `pip install 'av" in line


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with Session.load(bundle, slots=2, visual_tokens=2048, text_tokens=256, backend="onnxruntime") as opened:
        yield opened


def test_python(session: Session, folder: Path) -> None:
    """Frames as pictures, a batch with and without videos, and what is no video."""
    prompts = ["<video>What?", "Nothing to see?"]
    alone = session.generate(prompts[0], videos=[FRAMES], fps=RATE, max_new_tokens=4)
    both = session.generate(prompts, videos=[folder, None], fps=RATE, max_new_tokens=4)
    assert both[0].token_ids == alone.token_ids
    assert [answer.visual_tokens for answer in both] == [30, 0]
    with session.conversation() as conversation:
        stages: list[tuple[str, int, int]] = []
        chunks = conversation.stream(
            prompts[0], videos=folder, fps=RATE, max_new_tokens=1, progress=lambda *one: stages.append(one)
        )
        assert not any(stage == "vision" for stage, *_ in stages)
        list(chunks)
        assert stages[-3:] == [("frames", 4, 4), ("vision", 1, 2), ("vision", 2, 2)]
        assert session.backend.cache.group_count(conversation.slot) == 2  # no group mixes frames of different times
    for wrong, words in (([[]], "has no frames"), ([7], "must be a path or a list of frames, got int")):
        with pytest.raises(InputError, match=words):
            session.generate(prompts[0], videos=wrong, fps=RATE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="as many entries of videos"):
        session.generate(prompts, videos=[folder])
