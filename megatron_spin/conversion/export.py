"""A Megatron model of any layout as Hugging Face tensors, one at a time on rank 0, and as a directory that appears whole or not at all."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_spin.conversion.parameters import Mapped, mapped_parameters
from megatron_spin.conversion.records import Export, Parity
from megatron_spin.errors import CheckpointError
from megatron_spin.hf.assets import copy_assets, set_dtype
from megatron_spin.hf.files import DTYPES, read_hf_config, write_safetensors
from megatron_spin.hf.identity import IdentityHasher, tensor_digest
from megatron_spin.models.families import Family, family_of
from megatron_spin.models.rules import Geometry, Shape
from megatron_spin.parallel.collectives import gather_objects, raised_everywhere
from megatron_spin.parallel.dims import ParallelDims

MARKER = "export.json"
"""Written into every export: its identity and dtype, and what the gate measured. Only a directory that holds it is ever replaced."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One parameter as all stages see it: whose turn it is and what rank 0 will receive."""

    order: tuple[int, int, int]
    stage: int
    name: str
    hf: tuple[tuple[str, Shape], ...]


@torch.no_grad()
def stream_hf(
    model: Sequence[torch.nn.Module], hf_config: dict[str, Any], dims: ParallelDims, dtype: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights as (Hugging Face name, CPU tensor in ``dtype``), in the order of the layers; a collective.

    Each parameter is gathered over its tensor parallel ranks and sent from its pipeline stage to rank 0, one at a time. Rank 0 alone
    yields; every rank must exhaust the iterator all the same (``for _ in stream_hf(...): pass``). Padding of the vocabulary is never
    yielded, nor is the copy of a tied embedding, which must equal the original.

    Args:
        model: this rank's chunks.
        hf_config: the model's ``config.json``.
        dtype: ``fp32`` or ``bf16``.

    Raises:
        CheckpointError: a parameter has no rule, layers are missing, or the copies of a tied embedding differ.
    """
    geometry = Geometry.from_hf(hf_config)
    family = family_of(hf_config)
    with raised_everywhere(dims):
        mapped = {item.name: item for item in mapped_parameters(model, family=family, geometry=geometry)}
        own = [_entry(item, dims, geometry) for item in mapped.values()]
    stages = gather_objects(own, dims, dims.pg_collection.pp) if dims.pp_size > 1 else [own]
    entries = sorted(itertools.chain.from_iterable(stages), key=lambda entry: (entry.order, entry.stage))
    with raised_everywhere(dims):
        _check_complete(entries, family, geometry)
    if dims.dp_rank != 0:
        return
    embedding_digest, copy_digest = "", ""
    for entry in entries:
        tensors = _collect(entry, mapped.get(entry.name), dims, geometry, DTYPES[dtype])
        if dims.rank != 0:
            continue
        if geometry.tied and entry.name == family.embedding:
            embedding_digest = tensor_digest(tensors[0], dtype)
        if geometry.tied and entry.name == family.output:
            copy_digest = tensor_digest(tensors[0], dtype)
            continue
        yield from zip((name for name, _ in entry.hf), tensors, strict=True)
    if copy_digest and copy_digest != embedding_digest:
        raise CheckpointError(
            "the last pipeline stage's copy of the tied embedding differs from the first stage's: the model was trained without reducing "
            "their gradients, so it has no Hugging Face form; train it again"
        )


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
        CheckpointError: as :func:`stream_hf`, or ``out_dir`` holds something that is no export.
        OSError: the disk is full (nothing is left behind) or not writable.
    """
    out_dir = Path(out_dir)
    temporary = out_dir.with_name(f".{out_dir.name}.partial")
    with raised_everywhere(dims):
        config = read_hf_config(assets_dir)
        if dims.rank == 0:
            _check_replaceable(out_dir)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    hasher = IdentityHasher(dtype)
    parity: Parity | None = None
    tensors = stream_hf(model, config, dims, dtype)
    try:
        with raised_everywhere(dims):
            try:
                if dims.rank == 0:
                    write_safetensors(_hashed(tensors, hasher), temporary, max_shard_bytes=max_shard_bytes)
            finally:
                # The other ranks' whole part; and if rank 0 cannot write, they still wait to hand over the rest.
                for _ in tensors:
                    pass
            if dims.rank == 0:
                copy_assets(assets_dir, temporary)
                set_dtype(temporary, dtype)
                marker: dict[str, Any] = {"identity": hasher.hexdigest(), "dtype": dtype}
                if step is not None:
                    marker["step"] = step
                if verify is not None:
                    parity = verify(temporary)
                    marker |= dataclasses.asdict(parity)
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


def _entry(item: Mapped, dims: ParallelDims, geometry: Geometry) -> _Entry:
    shapes = item.rule.hf_shapes(item.shape, tp_size=dims.tp_size, geometry=geometry)
    return _Entry(item.order, dims.pp_rank, item.name, tuple(zip(item.hf_names, shapes, strict=True)))


def _check_complete(entries: Sequence[_Entry], family: Family, geometry: Geometry) -> None:
    present = {entry.name for entry in entries}
    layers = {entry.order[1] for entry in entries} - {-1}
    required = [family.embedding, family.final_norm, *([] if geometry.tied else [family.output])]
    missing = [name for name in required if name not in present] + [
        f"layer {n}" for n in range(geometry.num_layers) if n not in layers
    ]
    if missing or len(layers) > geometry.num_layers:
        raise CheckpointError(
            f"the Megatron model has {len(layers)} layers and lacks {', '.join(missing) or 'nothing'}, but config.json has "
            f"{geometry.num_layers} layers: give the config.json that belongs to the checkpoint"
        )


def _collect(
    entry: _Entry, item: Mapped | None, dims: ParallelDims, geometry: Geometry, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The whole Hugging Face tensors of ``entry`` on the CPU of rank 0; an empty list on every other rank."""
    pipeline = dims.pg_collection.pp
    if item is not None:
        local = item.parameter.detach().to(dtype)
        shards = _gather_shards(local, dims) if item.rule.sharded else [local]
        if dims.tp_rank != 0:
            return []
        tensors = item.rule.merge(shards, geometry=geometry)
        if dims.pp_rank != 0:
            for tensor in tensors:
                dist.send(tensor.contiguous(), dst=dist.get_global_rank(pipeline, 0), group=pipeline)
            return []
        # Copies: what is yielded must neither alias a parameter nor share one storage among several tensors.
        return [tensor.clone(memory_format=torch.contiguous_format).cpu() for tensor in tensors]
    if dims.rank != 0:
        return []
    received = [torch.empty(shape, dtype=dtype, device=dims.device) for _, shape in entry.hf]
    for tensor in received:
        dist.recv(tensor, src=dist.get_global_rank(pipeline, entry.stage), group=pipeline)
    return [tensor.cpu() for tensor in received]


def _gather_shards(local: torch.Tensor, dims: ParallelDims) -> list[torch.Tensor]:
    """All tensor parallel shards on the group's first rank; only the own one on the others."""
    if dims.tp_size == 1:
        return [local]
    group = dims.pg_collection.tp
    shards = [torch.empty_like(local) for _ in range(dims.tp_size)] if dims.tp_rank == 0 else None
    dist.gather(local.contiguous(), shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards or [local]


def _check_replaceable(out_dir: Path) -> None:
    if out_dir.exists() and not (out_dir / MARKER).is_file() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointError(
            f"{out_dir} exists and is no export of this program ({MARKER} is missing): choose another directory or remove it"
        )


def _replace(temporary: Path, out_dir: Path) -> None:
    old = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():  # out of the way in one step: a kill must not leave half of it under its name
        out_dir.rename(old)
    temporary.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
