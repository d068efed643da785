"""A real Triton Inference Server on a CPU. ``python tests/helpers/triton_server.py`` installs it beside the packages of
the Python that runs it, and so does `make test`; ``running`` starts one."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# A wheel that holds Triton 24.10, and what its Python backend needs in place of numpy 2.
SERVER, NUMPY = "nvidia-pytriton==0.7.0", "numpy==1.26.4"
FOLDER = Path(sys.prefix) / "triton"
ENVIRONMENT = FOLDER / "environment"
"""A Python environment with numpy 1 and all other packages of this one but torch, as on a machine that only serves."""
_SERVER = FOLDER / "server/pytriton/tritonserver"
_STUB = _SERVER / "backends/python/triton_python_backend_stub"


def install() -> None:
    """Download and unpack the server (55 MB, then 144 MB), and numpy (18 MB)."""
    if (reason := _obstacle()) is not None:
        print(f"the tests of Triton's server are left out: {reason}")
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    _pip(SERVER, FOLDER / "server")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(_SERVER / "python_backend_stubs" / version / _STUB.name, _STUB)
    for program in (_SERVER / "bin/tritonserver", _STUB):
        program.chmod(0o755)
    venv.create(ENVIRONMENT, with_pip=False)
    packages = ENVIRONMENT / "lib" / f"python{version}" / "site-packages"
    _pip(NUMPY, packages)
    others = sysconfig.get_path("purelib")
    line = f"import site, sys; sys.modules['torch'] = None; site.addsitedir({others!r})\n"
    (packages / "others.pth").write_text(line)  # read after numpy's own folder, which so comes first


def _obstacle() -> str | None:
    """Why the wheels do not run here."""
    libc, version = platform.libc_ver()
    is_known = (sys.platform, platform.machine(), libc) == ("linux", "x86_64", "glibc")
    if not is_known or tuple(map(int, version.split("."))) < (2, 35):
        return "they need Linux on x86-64 with glibc 2.35"
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        return "they need Python 3.11 or 3.12"
    return None if _libpython().is_file() else f"Python has no shared library at {_libpython()}"


def _libpython() -> Path:
    """The shared library of this Python, which the server's Python backend loads."""
    folder, name = (Path(sysconfig.get_config_var(key) or "") for key in ("LIBDIR", "INSTSONAME"))
    beside = folder / (sysconfig.get_config_var("MULTIARCH") or "") / name
    return beside if beside.is_file() else folder / name


def _pip(requirement: str, target: Path) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--only-binary=:all:"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(target), requirement], check=True)


@dataclass(frozen=True)
class TritonServer:
    """Where a server listens: the address of its HTTP side, and host and port of its gRPC side."""

    http: str
    grpc: str

    def post(self, path: str, body: bytes = b"") -> bytes:
        """The response to a request; raises HTTPError for one that is refused."""
        request = urllib.request.Request(f"{self.http}/v2/{path}", body, method="POST")
        with urllib.request.urlopen(request, timeout=120) as response:
            content: bytes = response.read()
            return content

    def is_ready(self, path: str = "health") -> bool:
        """Whether the server is, or a model: ``models/NAME``."""
        try:
            with urllib.request.urlopen(f"{self.http}/v2/{path}/ready", timeout=120):
                return True
        except OSError:
            return False


@contextmanager
def running(repository: Path, log: Path) -> Iterator[TritonServer]:
    """A server of a model repository, with no model loaded. Its Python is this one where a model names no other."""
    http, grpc = _free_port(), _free_port()
    arguments = ["--model-repository", str(repository), "--model-control-mode", "explicit"]
    arguments += ["--backend-directory", str(_SERVER / "backends"), "--allow-metrics", "false"]
    for name, port in (("http", http), ("grpc", grpc)):
        arguments += [f"--{name}-address", "127.0.0.1", f"--{name}-port", str(port)]
    # The stub takes the environment of the first python3 in PATH.
    environment = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/bin:/bin",
        "LD_LIBRARY_PATH": str(_libpython().parent),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as output:
        server = subprocess.Popen(
            [_SERVER / "bin/tritonserver", *arguments], env=environment, stdout=output, stderr=output
        )
    try:
        found = TritonServer(f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}")
        while not found.is_ready():
            assert server.poll() is None, f"the server has ended, see {log}"
            time.sleep(0.1)
        yield found
    finally:
        server.terminate()
        server.wait(120)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    install()
