"""A Hugging Face model in memory: it generates, and every parity check compares with its log-probs. No Megatron."""

import contextlib
import gc
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_spin.errors import CheckpointError, DeviceError
from megatron_spin.hf.files import DTYPES
from megatron_spin.machine import visible_gpus


def choose_device(name: str) -> torch.device:
    """The device of a transformers model for the configuration's ``device``; ``auto`` takes a GPU if there is one.

    Megatron needs more: ``parallel/setup.py`` also prepares the process for it.

    Raises:
        DeviceError: ``cuda`` and torch sees no GPU, or ``auto`` and torch cannot use those of this machine.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError(
            "device=cuda, but PyTorch sees no GPU: set device: cpu, or install a CUDA build of PyTorch and a driver"
        )
    if name == "auto":
        gpus = visible_gpus()
        if gpus.names and not available:
            raise DeviceError(
                f"this machine has {gpus}, but torch {torch.__version__} cannot use them: run `make setup LOCK=gpu` "
                "and check the driver, or set device=cpu"
            )
        name = "cuda" if available else "cpu"
    return torch.device(name)


def load_model(hf_dir: Path, *, dtype: str, device: torch.device) -> torch.nn.Module:
    """The causal language model in ``hf_dir``, in ``fp32`` or ``bf16``, in eval mode; never from the network.

    Raises:
        CheckpointError: it cannot be loaded, or its weights do not fill the model exactly.
        DeviceError: it is larger than the memory of ``device``.
    """
    with named_out_of_memory(f"the model {hf_dir} in {dtype}", device):
        return _from_pretrained(hf_dir, dtype).to(device).eval()


@contextlib.contextmanager
def streamed_model(hf_dir: Path, *, dtype: str, device: torch.device) -> Iterator[torch.nn.Module]:
    """The model of :func:`load_model` without its weights, for a few forward passes on a device too small for it.

    The forward pass of each module reads the module's own weights from the files and drops them behind it, so that the
    largest single weight is what memory must hold. Where transformers stores weights in another form than the files (it
    merges the experts of a layer), its own form of them goes to a temporary directory first.

    Raises:
        CheckpointError: as :func:`load_model`.
        DeviceError: ``device`` is too small even so.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # It warns that weights are not in memory, which is the purpose.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    with _named_load_errors(hf_dir), torch.device("meta"):
        config = AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    places = {}
    for name, module in skeleton.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            places[name] = "disk"
        elif not any(True for _ in module.children()):
            places[name] = str(device)  # rotary embeddings, activations: what has no weights runs where the others do
    what = f"one layer of the model {hf_dir} in {dtype}"
    with tempfile.TemporaryDirectory() as scratch, named_out_of_memory(what, device):
        yield _from_pretrained(hf_dir, dtype, device_map=places, offload_folder=scratch).eval()


def _from_pretrained(hf_dir: Path, dtype: str, **placement: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with _named_load_errors(hf_dir):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            hf_dir,
            dtype=DTYPES[dtype],
            local_files_only=True,
            use_safetensors=True,  # the other format is a pickle
            trust_remote_code=False,  # left out, transformers asks on the terminal whether to run the directory's code
            output_loading_info=True,
            **placement,
        )
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            keys = ", ".join(map(str, sorted(info[problem])))
            raise CheckpointError(f"{hf_dir}: {problem.replace('_', ' ')} {keys}: copy or export the model again")
    ready: torch.nn.Module = model
    return ready


@contextlib.contextmanager
def _named_load_errors(hf_dir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise
        raise CheckpointError(f"transformers cannot load {hf_dir} ({error}): copy or export the model again") from None


@contextlib.contextmanager
def named_out_of_memory(what: str, device: torch.device) -> Iterator[None]:
    """Raises an error of PyTorch's allocators in the block as a DeviceError that says ``what`` did not fit."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise DeviceError(
            f"{what} does not fit in the free memory of {device}: free some, raise parallel.tensor_model_parallel_size "
            "or parallel.pipeline_model_parallel_size, or use a larger device"
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU it is a RuntimeError like any other.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
    """Gives the memory of models that nothing refers to any more back to ``device``."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
