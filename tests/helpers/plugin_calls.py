"""Plugin objects through ``harness.cpp``: created from fields, asked as a builder asks, enqueued as an engine does."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

import pytest

from vkvx.plugins import build
from vkvx.plugins.operator import NAME, OUTPUTS, VERSION, OperatorAttributes

TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bfloat16": 7, "int64": 8}
"""``nvinfer1::DataType``."""
FIELD_TYPES = {float: 1, int: 5, str: 6}
"""``nvinfer1::PluginFieldType`` of a Python type."""
LINEAR = 0
PREBUILT = "VKVX_TEST_PLUGINS"
"""Names a folder with the three libraries, for a machine without headers."""


class Desc(ctypes.Structure):
    """``nvinfer1::PluginTensorDesc`` of TensorRT 10: ``Dims`` hold 64-bit numbers."""

    _fields_ = (("rank", c_int32), ("dims", c_int64 * 8), ("type", c_int32), ("format", c_int32), ("scale", c_float))

    @classmethod
    def of(cls, shape: Sequence[int], dtype: str, form: int = LINEAR) -> Desc:
        return cls(len(shape), (c_int64 * 8)(*shape), TYPES[dtype], form, 1.0)


class Field(ctypes.Structure):
    """``nvinfer1::PluginField``."""

    _fields_ = (("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32))


class FieldCollection(ctypes.Structure):
    """``nvinfer1::PluginFieldCollection``."""

    _fields_ = (("count", c_int32), ("fields", POINTER(Field)))


class Fields:
    """A collection of fields, and what it points to."""

    def __init__(self, values: dict[str, object]) -> None:
        self._held: list[object] = []
        fields = (Field * len(values))()
        for field, (name, value) in zip(fields, values.items(), strict=True):
            data = {
                int: lambda v: (c_int32 * 1)(v),
                float: lambda v: (c_float * 1)(v),
                str: lambda v: ctypes.create_string_buffer(v.encode(), max(len(v), 1)),
            }[type(value)](value)
            self._held.append(data)
            length = len(value) if isinstance(value, str) else 1
            field.name, field.data = name.encode(), ctypes.addressof(data)
            field.type, field.length = FIELD_TYPES[type(value)], length
        self._fields = fields
        self.collection = FieldCollection(len(values), fields)


@dataclass(frozen=True)
class Builds:
    """The libraries under test, built with the same headers."""

    folder: Path

    @property
    def runtime(self) -> Path | None:
        """The TensorRT library with a registry, if the package tensorrt-rtx-cu13 is installed."""
        spec = importlib.util.find_spec("tensorrt_rtx_libs")
        folders = (spec.submodule_search_locations or []) if spec else []
        return next((path for folder in folders if (path := Path(folder) / "libtensorrt_rtx.so.1").is_file()), None)

    def plugin(self, interface: int) -> Path:
        """The library of IPluginV3 or IPluginV2DynamicExt."""
        return self.folder / (build.TENSORRT if interface == 3 else build.TENSORRT8)


def compile_plugins(kernels: Path, folder: Path) -> None:
    """Compile the plugins of both interfaces and the harness into the folder; skips the test without compilers."""
    headers = build.find_headers()
    if headers is None or not all(map(shutil.which, ("cmake", "nvcc"))):
        pytest.skip("needs CMake, nvcc, the kernels and TensorRT's headers")
    definitions = (f"-DVKVX_KERNELS={kernels}", f"-DVKVX_TENSORRT_HEADERS={headers}")
    run(["cmake", "-S", str(build.SOURCES), "-B", str(folder), *definitions])
    run(["cmake", "--build", str(folder), "--parallel", "2", "--target", "vkvx_tensorrt", "vkvx_tensorrt8"])
    flags = ["-std=c++17", "-shared", "-Xcompiler=-fPIC,-Wno-deprecated-declarations", "-isystem", str(headers)]
    run(["nvcc", *flags, str(Path(__file__).with_name("harness.cpp")), "-o", str(folder / "harness.so")])


def run(command: list[str]) -> None:
    """Run a program; its output is the reason of a failure."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"


class Creator:
    """The creator of one interface, from the plugin itself or through the registry of TensorRT for RTX."""

    def __init__(self, builds: Builds, interface: int, *, registry: bool = False, namespace: str = "vkvx") -> None:
        self.library = library = ctypes.CDLL(str(builds.folder / "harness.so"))
        self.has_aliases = interface == 3
        library.harness_messages.restype = c_char_p
        library.harness_workspace.restype = c_size_t
        for name in ("creator", "create", "through_engine"):
            getattr(library, f"harness_{name}").restype = c_void_p
        library.harness_field_names.restype = POINTER(FieldCollection)
        if registry and builds.runtime is None:
            pytest.skip("needs the package tensorrt-rtx-cu13")
        runtime = str(builds.runtime).encode() if registry else None
        path = str(builds.plugin(interface)).encode()
        creator = library.harness_creator(
            runtime, path, interface, NAME.encode(), str(VERSION).encode(), namespace.encode()
        )
        assert creator, self.messages()
        self._creator = c_void_p(creator)

    def messages(self) -> str:
        """What was logged since the last call."""
        text = self.library.harness_messages().decode()
        self.library.harness_forget_messages()
        return text

    def field_names(self) -> dict[str, tuple[int, object]]:
        """Name to type and default of each field."""
        collection = self.library.harness_field_names(self._creator).contents
        return {field.name.decode(): (field.type, _value(field)) for field in collection.fields[0 : collection.count]}

    def create(self, values: dict[str, object], layer: str = "layer") -> Node | None:
        """A plugin object, or None if the creator refuses the fields; :meth:`messages` says why."""
        fields = Fields(values)
        pointer = self.library.harness_create(self._creator, layer.encode(), byref(fields.collection))
        if not pointer:
            return None
        table = {name: value for name, value in values.items() if name != "model_dtype"}
        return Node(self, pointer, len(OperatorAttributes(**table).inputs))  # type: ignore[arg-type]


def _value(field: Field) -> object:
    if field.type == FIELD_TYPES[str]:
        return ctypes.string_at(field.data, field.length).decode()
    kind = c_float if field.type == FIELD_TYPES[float] else c_int32
    return ctypes.cast(field.data, POINTER(kind)).contents.value


class Node:
    """A plugin object."""

    def __init__(self, creator: Creator, pointer: int, inputs: int) -> None:
        self.creator, self.library, self._node = creator, creator.library, c_void_p(pointer)
        self.inputs, self.outputs = inputs, len(OUTPUTS)

    def workspace(self, inputs: list[Desc], outputs: list[Desc]) -> int:
        return int(self.library.harness_workspace(self._node, *self._arrays(inputs, outputs)))

    def configure(self, inputs: list[Desc], outputs: list[Desc]) -> int:
        return int(self.library.harness_configure(self._node, *self._arrays(inputs, outputs)))

    def supports(self, position: int, tensors: list[Desc]) -> bool:
        array = (Desc * len(tensors))(*tensors)
        return bool(self.library.harness_supports(self._node, position, array, self.inputs, self.outputs))

    def output_type(self, output: int, types: list[str]) -> int:
        array = (c_int32 * len(types))(*(TYPES[name] for name in types))
        return int(self.library.harness_output_type(self._node, output, array, len(types)))

    def alias(self, output: int) -> int:
        return int(self.library.harness_alias(self._node, output))

    def through_engine(self) -> Node:
        """The object that an engine which was built with this one runs."""
        pointer = self.library.harness_through_engine(self._node, b"layer in an engine")
        assert pointer, self.creator.messages()
        return Node(self.creator, pointer, self.inputs)

    def enqueue(
        self,
        inputs: list[Desc],
        outputs: list[Desc],
        addresses: list[int],
        results: list[int],
        workspace: int,
        stream: int = 0,
    ) -> int:
        """0, or the code of the failure; addresses are those of the inputs, results those of the outputs."""
        pointers = ((c_void_p * len(addresses))(*addresses), (c_void_p * len(results))(*results))
        arrays = self._arrays(inputs, outputs)
        return int(self.library.harness_enqueue(self._node, *arrays, *pointers, c_void_p(workspace), c_void_p(stream)))

    def destroy(self) -> None:
        self.library.harness_destroy(self._node)

    @staticmethod
    def _arrays(inputs: list[Desc], outputs: list[Desc]) -> tuple[object, c_int, object, c_int]:
        return (Desc * len(inputs))(*inputs), c_int(len(inputs)), (Desc * len(outputs))(*outputs), c_int(len(outputs))
