"""A device that is not the CPU, where there is none: `sim`, CPU memory that claims to lie on an accelerator.

torch's key for accelerators from elsewhere, PrivateUse1, leads here. An operation runs the CPU's kernel on the same
memory, and refuses what a GPU refuses: operands of two devices, a generator of another device; and float64 where
`has_float64` is false, as on Apple's. What it says nothing of: kernels and their rounding, streams, speed, memory.

RETAIN_TEST_DEVICE=cuda runs the same tests on a GPU (`make gpu`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import os
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers.training_args
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

try:
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
except ImportError:
    pytest.skip("this torch lets no device be written in Python", allow_module_level=True)

DEVICE = os.environ.get("RETAIN_TEST_DEVICE", "sim")
SIMULATED = DEVICE == "sim"
REAL_TOLERANCE = 1e-3  # a GPU sums in another order
FREE_MEMORY = 1 << 30
ON_CPU, ON_EXTENSION = 1, 12  # DLPack's numbers
OTHER = "Expected all tensors to be on the same device"
SETTINGS = SimpleNamespace(has_float64=True)
GENERATORS: weakref.WeakValueDictionary[int, Generator] = weakref.WeakValueDictionary()
aten = torch.ops.aten


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test in a process of its own that has the device: no other test meets it. A real one needs none.

    It is a copy of a process that has taken no backward pass: autograd counts the devices at its first one.
    """

    @functools.wraps(test)
    def run(tmp_path: Path, **given: Any) -> None:
        said = tmp_path / "said.txt"
        if not SIMULATED:
            place(DEVICE)
            with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
                return test(tmp_path=tmp_path, **given)
        given = {name: one for name, one in given.items() if name != "monkeypatch"}
        process = untouched().Process(target=run_there, args=(test.__module__, test.__name__, said, given), daemon=True)
        process.start()
        process.join(120)
        process.kill()
        assert process.exitcode == 0, said.read_text()

    return run


@functools.cache
def untouched() -> Any:
    """Makes processes by forks of one that imports what they need, and computes nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["simulated_device", "retain.training.trainer", "peft", "trl"])
    with pytest.MonkeyPatch.context() as around:
        around.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def run_there(module: str, name: str, said: Path, given: dict[str, Any]) -> None:
    """Run the test of a module, now on the device."""
    warnings.simplefilter("ignore")
    with open(said, "w") as file, redirect_stdout(file), redirect_stderr(file), pytest.MonkeyPatch.context() as patch:
        try:
            test = inspect.unwrap(getattr(importlib.import_module(module), name))
            given |= {"monkeypatch": patch} if "monkeypatch" in inspect.signature(test).parameters else {}
            register()
            test(tmp_path=said.parent, **given)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None


def place(device: str) -> None:
    """Trainers that are built from now on are on this device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = device


def assert_as_on_cpu(work: Callable[[str], Any], tolerance: float = 1e-5) -> None:
    """The same numbers and texts on both devices, whatever holds them."""
    tolerance = tolerance if SIMULATED else max(tolerance, REAL_TOLERANCE)
    found = []
    for device in ("cpu", DEVICE):
        place(device)
        found.append(pytree.tree_flatten_with_path(work(device)))
    (expected, shape), (ours, our_shape) = found
    assert shape == our_shape
    for (path, one), (_, other) in zip(expected, ours, strict=True):
        if isinstance(one, torch.Tensor | np.ndarray | float):
            close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
            where = functools.partial("{}: {}".format, path)
            torch.testing.assert_close(torch.as_tensor(other).cpu(), torch.as_tensor(one).cpu(), **close, msg=where)
        else:
            assert one == other, path


class Generator(torch._C.Generator):
    """A generator that knows its device; a CPU draws its numbers."""

    home: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.home = torch.device(device)
        GENERATORS[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:
        return self.home


class OneDevice(TorchFunctionMode):
    """Refuses a generator of the device for a tensor of the CPU, which the CPU's kernels cannot tell from theirs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs:
            return function(*args)
        found = function(*args, **kwargs)
        if kwargs.get("generator") is not None and isinstance(found, torch.Tensor):
            check_generator(kwargs["generator"], found.device.type)
        return found


def is_ours(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE


def check_generator(generator: Any, wanted: str) -> None:
    known = GENERATORS.get(generator._cdata)
    kind = "cpu" if known is None else known.device.type
    if kind != wanted:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{kind}'")


def relabelled(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)).value = kind
    return torch._C._from_dlpack(capsule)


def put(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float64 and not SETTINGS.has_float64:
        raise TypeError("float64 on a device that has none")
    return relabelled(tensor, ON_EXTENSION)


def taken(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU; what is empty anew, since an operation may enlarge it."""
    if not is_ours(tensor):
        return tensor
    return relabelled(tensor, ON_CPU) if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Over an operation's arguments and results, some of them lists."""
    return type(value)(change(one) for one in value) if isinstance(value, list | tuple) else change(value)


def run_on_cpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation, by the CPU's kernel; a CPU's scalar is taken, and its indices are, as by CUDA."""
    takes_cpu = (1,) if op.overloadpacket in (aten.index, aten.index_put_, aten._index_put_impl_) else ()
    owners: dict[int, torch.Tensor] = {}

    def strictly(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not is_ours(value) and value.dim():
            raise RuntimeError(f"{op}: {OTHER}, but found {value.device} and {DEVICE}:0")
        if isinstance(value, torch._C.Generator):
            check_generator(value, DEVICE)
        return inside(value)

    def inside(value: Any) -> Any:
        if is_ours(value):
            found = taken(value)
            owners[id(found)] = value
            return found
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def outside(value: Any) -> Any:
        owner = owners.get(id(value))
        if owner is None:
            return put(value) if isinstance(value, torch.Tensor) else value
        return owner if owner.shape == value.shape else owner.set_(put(value))

    given = []
    for at, (argument, value) in enumerate(zip(op._schema.arguments, args, strict=False)):
        if type(value) in (int, float) and isinstance(argument.type, torch.TensorType):
            value = torch.tensor(value)  # a number has come for a tensor, and not every operation takes it
        given.append(mapped(inside if at in takes_cpu else strictly, value))
    return mapped(outside, op(*given, **{name: mapped(strictly, value) for name, value in kwargs.items()}))


def copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    taken(target).copy_(taken(source))
    return target


def product(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """What CUDA alone has: factors of two bytes, multiplied and summed in four."""
    assert left.dtype == right.dtype != out_dtype == torch.float32
    return left.float() @ right.float()


def in_lower_precision(op: Any) -> Callable[..., Any]:
    def lowered(value: Any) -> Any:
        floating = is_ours(value) and value.is_floating_point()
        return value.to(torch.get_autocast_dtype(DEVICE)) if floating else value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return op(*map(lowered, args), **{name: lowered(value) for name, value in kwargs.items()})

    return run


def as_on_cpu(op: Any) -> Callable[..., Any]:
    """Views: the CPU's kernels touch no memory."""
    return functools.partial(op.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))


class Module(_DummyBackendModule):
    """`torch.sim`, as `torch.cuda`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_device_name(self, device: Any = None) -> str:
        return "simulated"

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def max_memory_allocated(self, device: Any = None) -> int:
        return FREE_MEMORY // 2

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return FREE_MEMORY, 2 * FREE_MEMORY


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


@functools.cache  # keeps the libraries, too
def register() -> tuple[torch.library.Library, torch.library.Library]:
    """Let this process have the device, and trainers choose it. There is no way back."""
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=Module())
    every, ours = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(run_on_cpu, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    made = {
        "empty.memory_format": lambda size, dtype=None, **_: put(torch.empty(size, dtype=dtype)),
        "empty_strided": lambda size, stride, dtype=None, **_: put(torch.empty_strided(size, stride, dtype=dtype)),
        "_copy_from": copied,
        "mm.dtype": product,
        "as_strided": as_on_cpu(aten.as_strided.default),
        "view": as_on_cpu(aten.view.default),
        "set_.source_Storage": as_on_cpu(aten.set_.source_Storage),
        "set_.source_Tensor": as_on_cpu(aten.set_.source_Tensor),
        "set_.source_Storage_storage_offset": as_on_cpu(aten.set_.source_Storage_storage_offset),
    }
    for name, kernel in made.items():
        ours.impl(name, kernel, "PrivateUse1")
    for name in ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention"):
        ours.impl(name, in_lower_precision(getattr(aten, name).default), "AutocastPrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)  # else `.to` makes two of a tied weight
    # torch allocates no storage of such a device from Python, as `copy.deepcopy` and `torch.load` ask it to.
    torch.UntypedStorage.clone = lambda storage: bytes_of(storage).clone().untyped_storage()
    torch.UntypedStorage.to = lambda storage, *, device, **_: bytes_of(storage).to(device).untyped_storage()
    torch.Tensor.pin_memory = torch.Tensor.clone
    torch.Generator = Generator
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    OneDevice().__enter__()
    place(DEVICE)
    return every, ours
