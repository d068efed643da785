"""Which Python packages are there, and what to install for one that is missing."""

from __future__ import annotations

import importlib
import json
import re
import traceback
from importlib import metadata, util
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vkvx.errors import DependencyError

PIP_NAMES = {
    "PIL": "pillow",
    "cuda": "cuda-python",
    "onnx_ir": "onnx-ir",
    "prometheus_client": "prometheus-client",
    "sklearn": "scikit-learn",
}
"""Modules whose package has another name."""
RUN = ("numpy", "PIL", "jinja2", "onnx", "onnxruntime", "transformers")
"""Modules that running a bundle in onnxruntime takes."""
TORCH = ("numpy", "PIL", "jinja2", "safetensors", "torch", "transformers")
"""The same in torch."""
SERVE = ("starlette", "uvicorn", "pydantic", "prometheus_client")
"""Modules that the HTTP server takes beside those that run a bundle."""
EXPORT = ("numpy", "PIL", "onnx", "onnx_ir", "onnxscript", "safetensors", "torch", "transformers")
"""Modules that an export takes."""


def pip_name(module: str) -> str:
    """The package that provides a module."""
    top = module.partition(".")[0]
    return PIP_NAMES.get(top, top)


def requirement(package: str) -> str:
    """A package with the versions that this vkvx allows, for example ``onnx<2,>=1.20``."""
    try:
        declared = metadata.requires("vkvx") or []
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        declared = []
    for line in declared:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is not None and name.group().lower() == package.lower():
            return line.partition(";")[0].replace(" ", "")
    return package


def extra(names: str) -> str:
    """The command that installs extras of vkvx, with the marks around it: from where this vkvx came."""
    tree = Path(__file__).resolve().parents[1]
    if (tree / "pyproject.toml").is_file():
        return f"`pip install -e '{tree}[{names}]'`"
    found = [place for one in metadata.distributions(name="vkvx") if (place := one.read_text("direct_url.json"))]
    if not found:  # from an index
        return f"`pip install 'vkvx[{names}]'`"
    origin = json.loads(found[0])
    url, path = origin["url"], Path(url2pathname(urlsplit(origin["url"]).path))
    if not url.startswith("file:"):
        kind = origin.get("vcs_info", {}).get("vcs")
        return f"`pip install 'vkvx[{names}] @ {f'{kind}+' if kind else ''}{url}'`"
    if not path.exists():
        return f"`pip install 'PATH[{names}]'` with the path of a clone or a wheel of vkvx"
    return f"`pip install '{path}[{names}]'`"


def require(extra_name: str, *modules: str) -> None:
    """Raise a DependencyError that names all of these modules that are not there, and the extra that brings them.

    None of them is imported: whether they work, :func:`missing` tells where they are used.
    """
    absent = [pip_name(module) for module in modules if not _is_there(module)]
    if absent:
        *others, last = [f"'{name}'" for name in absent]
        listed = f"packages {', '.join(others)} and {last} are" if others else f"package {last} is"
        raise DependencyError(f"the Python {listed} missing; run {extra(extra_name)}")


def missing(module: str, error: BaseException | None = None) -> DependencyError:
    """The error for a module that cannot be imported; ``error`` is what its import raised, None if it is not there.

    Names the package that is at fault: ``module`` may be there, and something that it imports may not.
    """
    cause = _root(error)
    name = getattr(cause, "name", None) or module
    package = pip_name(name)
    wanted = f"`pip install '{requirement(package)}'`"
    if cause is None or (isinstance(cause, ModuleNotFoundError) and not _is_there(name)):
        top = module.partition(".")[0]
        needed = f", which '{pip_name(top)}' needs," if _importer(cause) == top else ""
        return DependencyError(f"the Python package '{package}'{needed} is missing; run {wanted}")
    reason = " ".join(str(cause).split())
    return DependencyError(
        f"the Python package '{package}' is installed but cannot be imported: {reason}; run {wanted} for versions that "
        "fit together, with --force-reinstall if files are missing"
    )


def _root(error: BaseException | None) -> BaseException | None:
    """What made an import fail: packages that import lazily wrap it, and lose the name of the module."""
    while error is not None and getattr(error, "name", None) is None and error.__cause__ is not None:
        error = error.__cause__
    return error


def _importer(error: BaseException | None) -> str:
    """The top-level package whose import statement failed, or ""."""
    trace = None if error is None else error.__traceback__
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]
    return next((name.partition(".")[0] for name in reversed(names) if not name.startswith("importlib")), "")


def _is_there(module: str) -> bool:
    try:
        return util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # a module that was put into sys.modules by hand
        return True


def probe(module: str) -> tuple[str | None, str | None]:
    """Version of an installed package (None if it is missing) and why its import fails (None if it does not)."""
    try:
        version = metadata.version(pip_name(module))
    except metadata.PackageNotFoundError:
        version = None
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a broken binary package raises anything
        cause = _root(error)
        name = getattr(cause, "name", None)
        if isinstance(cause, ModuleNotFoundError) and name == module:
            return None, "not installed"
        if isinstance(cause, ModuleNotFoundError) and name is not None:
            return version, f"needs the module {name}"
        return version, " ".join(f"{type(cause).__name__}: {cause}".split())
    return version or getattr(loaded, "__version__", "unknown"), None
