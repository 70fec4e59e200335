"""Megatron-Core on a CPU with gloo: the one file that knows Megatron's hard-coded CUDA calls.

:func:`install` replaces, for the whole process, the few ``torch.cuda`` functions that Megatron calls, and must run
before ``megatron.core`` is imported, since names are bound there at import. :func:`megatron_region` covers what can
only be covered around Megatron's own work (``device="cuda"`` keywords, comparisons with CUDA tensor types). It slows
every operation down, so it is used around build, schedule, step and checkpoint only. On CUDA neither changes anything.
"""

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_spin.errors import DeviceError
from megatron_spin.parallel.check import check_version

GPU_ONLY = ("transformer_engine", "apex")
"""Packages of CUDA kernels: if one is installed, Megatron prefers its optimizers and norms and fails on CPU tensors."""

_MALLOC_OPTIONS = {
    -4: 0,  # M_MMAP_MAX: no allocation is a mapping of its own
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: the heap does not shrink
    -2: 2**28,  # M_TOP_PAD: the heap grows in large pieces
}
"""Parameters of glibc's mallopt, by their numbers in malloc.h."""

_installed = False


def install() -> None:
    """Makes this process a CPU one, permanently; calling it again changes nothing.

    Raises:
        DeviceError: ``megatron.core`` is already imported without it, or its version was not tested.
    """
    global _installed
    if _installed:
        return
    check_version()
    if "megatron.core" in sys.modules:
        raise DeviceError(
            "megatron.core was imported before the CPU adapter: call megatron_spin.parallel.setup.choose_device first"
        )
    for name, replacement in _CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, replacement)
    for name in GPU_ONLY:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # importing it now raises ImportError
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    _import_megatron_without_compiling()
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _keep_memory()
    _installed = True


@contextlib.contextmanager
def megatron_region() -> Iterator[None]:
    """Wraps each call into Megatron that may create tensors or look at their types; costs nothing on CUDA."""
    if not _installed:
        yield
        return
    with _CpuForCuda():
        yield


class _CpuForCuda(TorchFunctionMode):
    """Maps ``cuda`` devices to the CPU, drops pinning, and names the types of CPU tensors as those of CUDA ones."""

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """A CPU has one stream and it is always in order.

    A class, not a function, since other code writes ``torch.cuda.Stream | None``.
    """

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


# One function object per name: torch._dynamo keeps a table by object, in which these names have different rules.
_CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "current_device": lambda: "cpu",
    "set_device": lambda *_: None,
    "synchronize": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "manual_seed": lambda seed: torch.manual_seed(seed),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    "current_stream": lambda *_: _Stream(),
    "default_stream": lambda *_: _Stream(),
    "stream": lambda *_: contextlib.nullcontext(),
    "Stream": _Stream,
}


def _keep_memory() -> None:
    """Lets glibc keep freed memory instead of returning it to the kernel.

    By default each large tensor is mapped when it is made and unmapped when it is freed, and the kernel clears its
    pages each time. A step makes hundreds of them.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library
        return
    for option, value in _MALLOC_OPTIONS.items():
        libc.mallopt(option, value)


def _import_megatron_without_compiling() -> None:
    """Imports Megatron's layers without ``torch.compile``, to which ``jit_fuser`` is bound at import.

    On a CPU it costs a compiler run per function and changes rounding.
    """
    compile_function = torch.compile

    def as_it_is(function: Any = None, **_: Any) -> Any:
        return function if function is not None else (lambda inner: inner)

    torch.compile = as_it_is  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # Megatron warns a dozen times that Transformer Engine and Apex are not installed; announce() says it once.
            warnings.simplefilter("ignore")
            import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    finally:
        torch.compile = compile_function
