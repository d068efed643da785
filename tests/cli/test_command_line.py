"""The frame around the verbs: help, version, errors in one line, exit codes, laziness."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import Result

import vkvx
from vkvx import cli as command_line
from vkvx import packages
from vkvx.cli import doctor, main, terminal
from vkvx.errors import CapacityError
from vkvx.runtime.sessions.processor import user_message

HEAVY = (
    *("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"),
    *("matplotlib", "numpy", "PIL", "sklearn", "tqdm"),
)
VERBS = [module.__name__.rpartition(".")[2] for module in command_line.VERBS]


def loaded_by(program: str, *arguments: str) -> list[str]:
    """Which heavy packages a program has loaded at its end, in a process of its own."""
    report = f"print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    command = [sys.executable, "-c", f"import sys\n{program}\n{report}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()[-1].split()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "/nowhere", "hello"]])
def test_light_commands_load_nothing_heavy(arguments: list[str]) -> None:
    loaded = loaded_by("from vkvx.cli import main; main(sys.argv[1:])", *arguments)
    assert set(loaded) <= ({"numpy", "PIL"} if "/nowhere" in arguments else set())


def test_pictures_come_first_unless_the_prompt_says_where() -> None:
    picture, text = {"type": "image"}, {"type": "text", "text": "What differs?"}
    assert user_message("What differs?", 2) == {"role": "user", "content": [picture, picture, text]}
    told = [{"type": "text", "text": "This "}, picture, {"type": "text", "text": " or that <image>?"}]
    assert user_message(r"This <image> or that <\image>?", 1) == {"role": "user", "content": told, "is_placed": True}
    assert user_message("What is <image>?", 0)["content"] == [{"type": "text", "text": "What is <image>?"}]


def test_errors_as_json_for_every_verb_that_has_json(cli: Callable[..., Result], tmp_path: Path) -> None:
    verbs = [verb for verb in VERBS if "--json" in cli(verb, "--help").out]
    assert len(verbs) > 8
    (tmp_path / "a").mkdir()
    wrong = [(verb, "--nonsense", "--json") for verb in (*verbs, "deploy")]
    wrong += [(verb, tmp_path / "a", "--json") for verb in ("inspect", "run", "validate", "bench", "build", "export")]
    for arguments in wrong:
        result = cli(*arguments)
        error = json.loads(result.out)["error"]
        assert result.err == f"vkvx: error: {error['message']}\n"
        assert error["type"].endswith("Error")
        assert result.code == error["exit_code"] == 2
    assert cli("run", "--", "--json").out == ""  # a bundle of that name


def test_the_example_of_the_help_works_as_it_stands(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (Path.cwd(), Path("/")):
        monkeypatch.chdir(folder)
        (path,) = re.findall(r"--image (.*)", cli("--help").out)
        assert Path(path).is_file()


def test_help_of_every_verb_loads_nothing_heavy() -> None:
    program = "from vkvx.cli import main\nfor verb in sys.argv[1:]: assert main([verb, '--help']) == 0"
    assert loaded_by(program, *VERBS) == []


def test_import_of_the_package_is_lazy_and_complete() -> None:
    assert loaded_by("import vkvx") == []
    for name in vkvx.__all__:
        assert getattr(vkvx, name) is not None
    assert set(vkvx.__all__) <= set(dir(vkvx))
    with pytest.raises(AttributeError, match="no_such_name"):
        vkvx.no_such_name  # noqa: B018


def test_every_verb_has_help(cli: Callable) -> None:
    for verb in VERBS:
        result = cli(verb, "--help")
        assert result.code == 0
        assert f"usage: vkvx {verb}" in result.out


def test_version(cli: Callable) -> None:
    result = cli("--version")
    assert (result.code, result.out) == (0, f"vkvx {vkvx.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "VERB"),
        (["unknown"], "invalid choice: 'unknown'"),
        (["run"], "required: BUNDLE"),
        (["run", "b"], "neither PROMPT nor --prompt-file"),
        (["run", "b", "p", "--imag", "x"], "unrecognized arguments: --imag x"),
        (["export", "tiny-llava", "--bit", "1"], "unrecognized arguments: --bit 1"),
        (["export", "tiny-llava", "--bits", "one"], "invalid int value: 'one'"),
        (["export", "tiny-llava", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["validate", "b", "--steps", "0"], "--steps 0"),
        (["run", "b", "p", "--top-p", "0"], "--top-p"),
        (["run", "b", "p", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(cli: Callable, arguments: list[str], words: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("vkvx: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def _raise(error: BaseException) -> Callable[..., int]:
    def execute(_: object) -> int:
        raise error

    return execute


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CapacityError("too\n  long"), 2, "too long"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "no space left on the disk while writing /x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "no permission for /x/y"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"), 2, "No such file or directory: /x/y"),
        (ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir"), 2, "pip install 'onnx-ir<2,>=1.1'"),
        (MemoryError(), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 70, "unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_every_error_is_one_line(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    monkeypatch.setattr(doctor, "run", _raise(error))
    result = cli("doctor")
    assert result.code == code
    assert result.err.startswith("vkvx: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", _raise(CapacityError("too long")))
    for arguments in (["--debug", "doctor"], ["doctor", "--debug"]):
        with pytest.raises(CapacityError, match="too long"):
            main(arguments)


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = "from vkvx.cli import main, terminal; import sys; sys.exit(main(['doctor', '--help']))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before anything is written
        error = process.stderr.read()
        code = process.wait()
    assert error == b""
    assert code in (command_line.EXIT_OK, command_line.EXIT_PIPE)


def test_ctrl_c_exits_130() -> None:
    program = (
        "import signal, sys, time; from vkvx.cli import doctor, main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it is ignored in a background job
        "def wait(args): print('ready', flush=True); time.sleep(60)\n"
        "doctor.run = wait\n"
        "sys.exit(main(['doctor']))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        error = process.stderr.read()
        assert process.wait() == 130
    assert error == b"vkvx: error: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "work",
    [
        "exec('send()')",
        "with storage.new_directory(target) as folder, contextlib.suppress(BaseException):\n"
        "        (folder / 'half').touch(); send()",
    ],
    ids=["text", "swallowed"],
)
def test_signals_end_a_command(work: str, number: signal.Signals, tmp_path: Path) -> None:
    """Python itself notes a KeyboardInterrupt that leaves exec() of text; a library may swallow what we raise."""
    (tmp_path / "program.py").write_text(f"""\
import contextlib, os, sys, time
from pathlib import Path
from vkvx import storage
from vkvx.cli import doctor, entry
target = Path("results", "out")
target.parent.mkdir()
def send():
    os.kill(os.getpid(), {number.value})
    time.sleep(60)
def work(args):
    {work}
doctor.run = work
sys.argv[1:] = ["doctor"]
entry()
""")
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        cwd=tmp_path,
        preexec_fn=partial(signal.signal, number, signal.SIG_DFL),  # not under nohup
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (130, "vkvx: error: interrupted\n")
    assert not any((tmp_path / "results").iterdir())


def test_doctor(cli: Callable) -> None:
    result = cli("doctor")
    assert result.code == 0
    assert "✓ export" in result.out
    assert "✓ run on a CPU" in result.out
    found = json.loads(cli("doctor", "--json").out)
    assert found["vkvx"] == vkvx.__version__
    assert found["packages"]["torch"]["works"] is True
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]
    assert {entry["name"]: entry["works"] for entry in found["works"]}["export"] is True


def test_doctor_says_what_to_install(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    real = packages.probe
    gone = {"onnxscript": (None, "not installed"), "transformers": ("1.0", "ImportError: broken")}
    monkeypatch.setattr(packages, "probe", lambda module: gone.get(module) or real(module))
    result = cli("doctor")
    assert result.code == 1
    assert "✗ export: onnxscript: not installed; transformers: ImportError: broken" in result.out
    assert "pip install 'onnxscript<0.8,>=0.7' 'transformers<6,>=5.20'" in result.out


def test_doctor_with_a_gpu_but_no_cuda_provider(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_devices", lambda: ["NVIDIA X, 9.0"])
    monkeypatch.setattr(doctor, "probe_providers", lambda: (["CPUExecutionProvider"], {}))
    result = cli("doctor")
    assert result.code == 0
    assert "✗ run on an NVIDIA GPU: this onnxruntime has no CUDA provider" in result.out
    assert "pip install 'onnxruntime-gpu" in result.out


def test_doctor_on_torch_with_a_gpu(cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    name = "run in torch on an NVIDIA GPU"
    monkeypatch.setenv("VKVX_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"✗ {name}: torch {torch.__version__}: " in cli("doctor").out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = cli("doctor")
    assert f"✗ {name}: not built\n      vkvx plugin build" in result.out
    monkeypatch.setenv("VKVX_LIBRARY", str(tmp_path / "libvkvx.so"))
    assert f"✗ {name}: VKVX_LIBRARY names {tmp_path}" in cli("doctor").out
    (tmp_path / "libvkvx.so").touch()
    assert f"✗ {name}: cannot load {tmp_path}" in cli("doctor").out
    monkeypatch.setattr("vkvx.plugins.library.KernelLibrary", lambda path: None)
    assert f"✓ {name}\n" in cli("doctor").out + "\n"


def test_probe_of_a_missing_and_of_a_broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vkvx_broken.py").write_text("raise RuntimeError('bad\\nlibrary')")
    (tmp_path / "vkvx_needy.py").write_text("import vkvx_absent")
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.probe("vkvx_absent") == (None, "not installed")
    assert packages.probe("vkvx_broken") == (None, "RuntimeError: bad library")
    assert packages.probe("vkvx_needy") == (None, "needs the module vkvx_absent")


def test_human_bytes() -> None:
    sizes = [0, 1023, 1024, 1536 * 1024, 5 * 1024**3]
    assert [terminal.human_bytes(size) for size in sizes] == ["0 B", "1,023 B", "1.0 KiB", "1.5 MiB", "5.00 GiB"]


def test_ranges() -> None:
    assert terminal.ranges([]) == []
    assert terminal.ranges([8, 8, 1, 2, 2]) == [("0-1", 8), ("2", 1), ("3-4", 2)]


def test_progress_without_a_terminal_is_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.ProgressBar("export") as progress:
        for done in range(3):
            progress("trace", done, 2)
        progress("weights", 10, 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["export: trace", "export: weights"]
    with terminal.ProgressBar("run", announce=False) as progress:
        progress("verify", 1, 1)
    assert capsys.readouterr().err == ""


def test_a_stage_that_fails_is_not_announced(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with terminal.ProgressBar("export") as progress:
            progress("weights", 1, 10)
            raise CapacityError("too long")

    with pytest.raises(CapacityError):
        fail()
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with terminal.ProgressBar("export") as progress:
        progress("weights", 0, 1 << 21)
        progress("weights", 1 << 21, 1 << 21)
    assert "weights" in shown.getvalue()
    assert "100%" in shown.getvalue()
    assert "2.00M" in shown.getvalue()
