"""A Megatron model as a Hugging Face directory that appears whole or not at all."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_spin.conversion.identity_record import RECORD, file_states, keep_identities
from megatron_spin.conversion.records import Export, Parity
from megatron_spin.conversion.stream import HfStream
from megatron_spin.errors import CheckpointError
from megatron_spin.hf.assets import copy_assets, read_hf_config, set_dtype
from megatron_spin.hf.files import write_safetensors
from megatron_spin.hf.identity import IdentityHasher
from megatron_spin.models.family import HfConfig
from megatron_spin.parallel.collectives import gather_objects, on_rank_zero, raised_everywhere
from megatron_spin.parallel.dims import ParallelDims

MARKER = "export.json"
"""Written into every export: its identity and dtype, and what the gate measured. Only a directory that holds it is ever
replaced."""


def export_hf(
    model: Sequence[torch.nn.Module],
    assets_dir: Path,
    out_dir: Path,
    dims: ParallelDims,
    dtype: str,
    *,
    max_shard_bytes: int = 5 * 10**9,
    step: int | None = None,
    verify: Callable[[Path], Parity] | None = None,
) -> Export:
    """Writes the model to ``out_dir`` as a Hugging Face directory; a collective, with the same result on every rank.

    Everything is written into a temporary directory beside ``out_dir``, checked there by ``verify`` and renamed at the
    end: ``out_dir`` is whole or not there. An earlier export at ``out_dir`` is replaced.

    Args:
        model: this rank's chunks.
        assets_dir: directory with config.json, generation config and tokenizer files.
        out_dir: the directory to write.
        dtype: ``fp32`` or ``bf16``, of the files and in ``config.json``.
        max_shard_bytes: weights beyond it go into further files, with an index; one tensor is never split.
        step: training step of the weights, kept in ``export.json``.
        verify: called on rank 0 with the finished temporary directory; what it returns is kept in ``export.json``, what
            it raises discards the export.

    Raises:
        CheckpointError: as :func:`megatron_spin.conversion.stream.HfStream`, or ``out_dir`` holds something that is no
            export.
        OSError: the disk is full (nothing is left behind) or not writable.
    """
    out_dir = Path(out_dir)
    temporary = out_dir.with_name(f".{out_dir.name}.partial")

    def prepare() -> HfConfig:
        hf_config = read_hf_config(assets_dir)
        _check_replaceable(out_dir)
        return hf_config

    stream = HfStream(model, on_rank_zero(dims, prepare), dims, dtype)
    tensors = iter(stream)
    hasher = IdentityHasher(dtype)
    parity: Parity | None = None
    try:
        with raised_everywhere(dims):
            try:
                if dims.rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
                    write_safetensors(
                        _hashed(tensors, hasher),
                        temporary,
                        shapes=stream.shapes,
                        dtype=dtype,
                        max_shard_bytes=max_shard_bytes,
                    )
            finally:
                # The other ranks only take part in the stream. If rank 0 fails to write, they still wait to send the
                # rest.
                for _ in tensors:
                    pass
            if dims.rank == 0:
                copy_assets(assets_dir, temporary)
                set_dtype(temporary, dtype)
                marker: dict[str, Any] = {"identity": hasher.hexdigest(), "dtype": dtype}
                if step is not None:
                    marker["step"] = step
                written = file_states(temporary, temporary / RECORD)
                if verify is not None:
                    parity = verify(temporary)
                    marker |= dataclasses.asdict(parity)
                keep_identities(temporary, {dtype: hasher.hexdigest()}, temporary / RECORD, before=written)
                (temporary / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
                _replace(temporary, out_dir)
    except BaseException:
        if dims.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return gather_objects(Export(hasher.hexdigest(), parity), dims)[0]


def _hashed(tensors: Iterable[tuple[str, torch.Tensor]], hasher: IdentityHasher) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        hasher.add(name, tensor)
        yield name, tensor


def _check_replaceable(out_dir: Path) -> None:
    if not out_dir.exists() or (out_dir / MARKER).is_file():
        return
    if not out_dir.is_dir() or any(out_dir.iterdir()):
        raise CheckpointError(
            f"{out_dir} exists and is no export of this program ({MARKER} is missing): "
            "choose another directory or remove it"
        )


def _replace(temporary: Path, out_dir: Path) -> None:
    old = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        # One rename moves it out of the way: a kill must not leave half of a directory under its name.
        out_dir.rename(old)
    temporary.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
