"""One rank of any layout on fake CUDA tensors: shapes, dtypes and devices are computed, values are not, and no GPU is
needed.

torch's FakeTensorMode knows tensors on ``cuda:0`` without their memory and refuses what mixes devices, as a GPU does.
torch's "fake" process group makes one process a rank of a world of any size; its collectives move nothing. Together
they run the product's code for CUDA, which a CPU otherwise never takes, and 70B parameters cost no memory.

What they do not show:

- values: a number that the host reads is 1.0, a whole number is 0 and a truth value false;
- the backward pass: each parameter gets a gradient of its own shape and dtype, and DistributedDataParallel's hook for
  it runs, but no operation's derivative;
- scalars: torch lets a 0-dimensional CPU tensor take part in an operation on a GPU;
- what only a real device does: kernels, streams and their order, memory, NCCL;
- Transformer Engine: its kernels take no fake tensors, so the layers are those of the local spec;
- what another rank sends: objects that are gathered are copies of this rank's.
"""

import collections
import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)

aten = torch.ops.aten


class HostReads(TorchDispatchMode):
    """Counts the reads of GPU memory by the host, each of which waits for the GPU, by the function that reads.

    Reads whose size depends on values (``nonzero``, a boolean index) are errors under FakeTensorMode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()
        """``file:function`` of the innermost frame in the package or in Megatron to its number of reads."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].device.type == "cuda":
                self._note()
            return _scalar(args[0].dtype)
        if func is aten._to_copy.default and _leaves(args[0], torch.device(kwargs.get("device") or args[0].device)):
            self._note()
        if func is aten.copy_.default and _leaves(args[1], args[0].device):
            self._note()
        return func(*args, **kwargs)

    def _note(self) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            match = re.search(r"/(megatron_spin|megatron/core)/.*", frame.f_code.co_filename)
            if match:
                self.count[f"{match[0][1:]}:{frame.f_code.co_qualname}"] += 1
                return
            frame = frame.f_back  # type: ignore[assignment]
        self.count["elsewhere"] += 1


def _leaves(source: torch.Tensor, target: torch.device) -> bool:
    return source.device.type == "cuda" and target.type == "cpu"


def _scalar(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 0


def install() -> None:
    """Makes this process a fake CUDA one, permanently; call it before ``megatron.core`` is imported."""
    for name, replacement in _CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, replacement)
    for name in ("transformer_engine", "apex"):
        sys.modules[name] = None  # type: ignore[assignment] # importing it now raises ImportError
    torch.compile = _as_it_is  # type: ignore[assignment] # jit_fuser, which Megatron binds at import
    _without_device_guard()
    torch.nn.Module._apply = _apply  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self.to(DEVICE)  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    FakeTensor.numpy = _ones  # type: ignore[method-assign, assignment]
    FakeTensor.tolist = lambda self: _ones(self.cpu()).tolist()  # type: ignore[method-assign] # one read, not many
    _without_other_ranks()
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda *_, **__: None
    from megatron.core.optimizer import clip_grads

    clip_grads.l2_norm_impl = _norm


class _Stream:
    """Stands for streams and events: nothing is ever waited for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def record_event(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...


class _Work:
    """A collective that has ended."""

    def wait(self, *_: object) -> None: ...


_CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "current_device": lambda: DEVICE,
    "set_device": lambda *_: None,
    "synchronize": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "manual_seed": lambda _: None,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda *_: None,
    "current_stream": lambda *_: _Stream(),
    "default_stream": lambda *_: _Stream(),
    "stream": lambda *_: contextlib.nullcontext(),
    "Stream": _Stream,
    "Event": _Stream,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "fake",
}
"""What Megatron and the product call of ``torch.cuda`` without a tensor in hand."""


def _as_it_is(function: Any = None, **_: Any) -> Any:
    return function if function is not None else (lambda inner: inner)


def _without_device_guard() -> None:
    """Lets slices of fake CUDA tensors be taken where there is no CUDA driver.

    torch switches to a tensor's device before it slices. Its switch for CUDA is missing in a CPU build, and fails
    without a driver in the CUDA build; that of the meta device does nothing.
    """
    library = ctypes.CDLL(str(Path(torch.__path__[0], "lib", "libc10.so")))
    cuda, meta = 1, 14  # c10::DeviceType
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    assert guards[meta], "torch has changed its table of device guards"
    guards[cuda] = guards[meta]


def _apply(self: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """``Module._apply``, which ``to`` and ``bfloat16`` call; torch's own swaps tensors, which fake ones refuse."""
    for module in self.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            with torch.no_grad():
                new = torch.nn.Parameter(function(old), requires_grad=old.requires_grad)
            for attribute, value in vars(old).items():  # a real parameter stays the same object
                if attribute not in vars(new):
                    setattr(new, attribute, value)
            module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


def _norm(chunk_size: int, flag: torch.Tensor, tensors: list[list[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
    """The gradient norm, [1]: as the fused kernels of Transformer Engine and apex, it leaves the result on the GPU.

    Megatron's own, for a machine without both, reads one number per parameter.
    """
    return torch.stack([tensor.norm() for tensor in tensors[0]]).norm().reshape(1), None


def _ones(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.device.type == "cpu", "a GPU's tensor has no NumPy form"
    kind = torch.empty(0, dtype=tensor.dtype, device="meta").dtype
    return np.ones(tuple(tensor.shape), dtype=str(kind).removeprefix("torch."))


def _without_other_ranks() -> None:
    """Answers what the other ranks of a fake process group cannot."""
    from megatron_spin.parallel import collectives

    new_group = dist.new_group

    def fake_group(*arguments: Any, **named: Any) -> Any:
        return new_group(*arguments, **{**named, "backend": None, "pg_options": None})

    def gather(gathered: list[Any], value: Any, group: Any = None) -> None:
        gathered[:] = [value] * len(gathered)

    @contextlib.contextmanager
    def one_by_one(*_: Any, **__: Any) -> Iterator[_Work]:
        yield _Work()

    dist.new_group = fake_group
    dist._coalescing_manager = one_by_one  # fake tensors know no coalesced collectives
    dist.all_gather_object = gather  # type: ignore[assignment]
    # Rank 0 decides alone and this process may be any rank, so it takes the decision itself.
    collectives.on_rank_zero = lambda ranks, action: action()


@contextlib.contextmanager
def rank_of(world_size: int, rank: int) -> Iterator[HostReads]:
    """This process as ``rank`` of a fake world; tensors made in the block are fake, and reads of the host counted."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), HostReads() as reads:
            yield reads
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def neighbours(model: Sequence[Any], shape: tuple[int, int]) -> Iterator[None]:
    """Stands in for the other pipeline stages and for the backward pass of ``model``, this rank's chunks.

    Args:
        shape: (sequences, positions) of all microbatches: neighbours send activations of that shape.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    config = model[0].config
    sequences, positions = shape
    if config.sequence_parallel:
        positions //= config.tensor_model_parallel_size
    sent = [positions, sequences, config.hidden_size]
    ask, backward = P2PCommunicator._communicate_shapes, torch.autograd.backward

    def communicate_shapes(*arguments: Any, **named: Any) -> tuple[list[int], list[int]]:
        ask(*arguments, **named)
        return sent, sent

    def give_gradients(tensors: Any, *_: Any, **__: Any) -> None:
        output = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
        assert output.requires_grad and output.device == DEVICE, output
        for chunk in model:
            for parameter in reversed(list(chunk.parameters())):
                parameter.grad = torch.empty_like(parameter)
                chunk._make_backward_post_hook(parameter)()

    P2PCommunicator._communicate_shapes = communicate_shapes
    torch.autograd.backward = give_gradients
    try:
        yield
    finally:
        P2PCommunicator._communicate_shapes = ask
        torch.autograd.backward = backward
