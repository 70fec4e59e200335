"""A Hugging Face model in memory: it generates, and every parity check compares with its log-probs. No Megatron."""

import gc
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
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
        )
        model, info = loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {hf_dir} ({error}): copy or export the model again") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            keys = ", ".join(map(str, sorted(info[problem])))
            raise CheckpointError(f"{hf_dir}: {problem.replace('_', ' ')} {keys}: copy or export the model again")
    ready: torch.nn.Module = model.to(device).eval()
    return ready


def release_memory(device: torch.device) -> None:
    """Gives the memory of models that nothing refers to any more back to ``device``."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
