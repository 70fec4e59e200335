"""A Megatron model of any layout as Hugging Face tensors, one at a time on rank 0."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_spin.conversion.parameters import Mapped, mapped_parameters
from megatron_spin.errors import CheckpointError
from megatron_spin.hf.files import DTYPES
from megatron_spin.hf.identity import tensor_digest
from megatron_spin.models.families import family_of
from megatron_spin.models.family import Family, HfConfig
from megatron_spin.models.rules import Geometry, Shape
from megatron_spin.parallel.collectives import gather_objects, raised_everywhere
from megatron_spin.parallel.dims import ParallelDims


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One parameter as all ranks see it: when it is due, which rank sends it and what rank 0 receives."""

    order: tuple[int, int, int, int]
    source: int
    """The rank that merges and sends it: of the ranks that hold its parts, the first."""
    name: str
    layer: int | None
    expert: int | None
    hf: tuple[tuple[str, Shape], ...]


@torch.no_grad()
def stream_hf(
    model: Sequence[torch.nn.Module], hf_config: HfConfig, dims: ParallelDims, dtype: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights as (Hugging Face name, CPU tensor in ``dtype``), in the order of the layers; a collective.

    One at a time, each parameter is gathered over the tensor parallel ranks of the pipeline stage (and of the expert
    parallel rank) that holds it, and sent to rank 0. Only rank 0 yields, but every rank must exhaust the iterator
    (``for _ in stream_hf(...): pass``). Padding of the vocabulary is never yielded, nor is the copy of a tied
    embedding, which must equal the original.

    Args:
        model: this rank's chunks.
        hf_config: the model's ``config.json``.
        dtype: ``fp32`` or ``bf16``.

    Raises:
        CheckpointError: a parameter has no rule, layers or experts are missing, or the copies of a tied embedding
            differ.
    """
    family = family_of(hf_config)
    with raised_everywhere(dims):
        geometry = family.geometry(hf_config)
        mapped = mapped_parameters(model, family=family, geometry=geometry, dims=dims)
        own = _entries(mapped, dims, geometry)
    # Stages and expert ranks hold different parameters: after both gathers every rank knows all of them.
    for group, size in ((dims.pg_collection.pp, dims.pp_size), (dims.pg_collection.ep, dims.ep_size)):
        if size > 1:
            own = list(itertools.chain.from_iterable(gather_objects(own, dims, group)))
    # The same order on every rank, so that sends and receives match.
    entries = sorted(own, key=lambda entry: (entry.order, entry.source))
    with raised_everywhere(dims):
        _check_complete(entries, family, geometry)
    if dims.expert_dp_rank != 0:
        return  # another rank holds the same weights, experts included
    items = {item.name: item for item in mapped}
    embedding_digest, copy_digest = "", ""
    for entry in entries:
        tensors = _collect(entry, items.get(entry.name), dims, geometry, DTYPES[dtype])
        if dims.rank != 0:
            continue
        if geometry.tied and entry.name == family.embedding:
            embedding_digest = tensor_digest(tensors[0], dtype)
        if geometry.tied and entry.name == family.output:
            copy_digest = tensor_digest(tensors[0], dtype)
            continue
        for (name, _), tensor in zip(entry.hf, tensors, strict=True):
            yield name, tensor
    if copy_digest and copy_digest != embedding_digest:
        raise CheckpointError(
            "the last pipeline stage's copy of the tied embedding differs from the first stage's: the model was "
            "trained without reducing their gradients, so it has no Hugging Face form; train it again"
        )


def _entries(mapped: Sequence[Mapped], dims: ParallelDims, geometry: Geometry) -> list[_Entry]:
    """What this rank's tensor parallel group has to send."""
    source = _first_tensor_rank(dims)
    entries = []
    for item in mapped:
        if item.expert is None and dims.ep_rank != 0:
            continue  # expert parallel rank 0 sends what all of them hold
        shapes = item.rule.hf_shapes(item.shape, tp_size=dims.tp_size, geometry=geometry)
        hf = tuple(zip(item.hf_names, shapes, strict=True))
        entries.append(_Entry(item.order, source, item.name, item.layer, item.expert, hf))
    return entries


def _first_tensor_rank(dims: ParallelDims) -> int:
    return dist.get_global_rank(dims.pg_collection.tp, 0) if dims.tp_size > 1 else dims.rank


def _check_complete(entries: Sequence[_Entry], family: Family, geometry: Geometry) -> None:
    present = {entry.name for entry in entries}
    layers: set[int] = set()
    experts: dict[int, set[int]] = collections.defaultdict(set)
    for entry in entries:
        if entry.layer is not None:
            layers.add(entry.layer)
            if entry.expert is not None:
                experts[entry.layer].add(entry.expert)
    required = [family.embedding, family.final_norm]
    if not geometry.tied:
        required.append(family.output)
    missing = [name for name in required if name not in present]
    for layer in range(geometry.num_layers):
        if layer not in layers:
            missing.append(f"layer {layer}")
    for layer, numbers in sorted(experts.items()):
        for expert in range(geometry.num_experts):
            if expert not in numbers:
                missing.append(f"expert {expert} of layer {layer}")
    if missing or len(layers) > geometry.num_layers:
        raise CheckpointError(
            f"the Megatron model has {len(layers)} layers and lacks {', '.join(missing) or 'nothing'}, but config.json "
            f"has {geometry.num_layers} layers: give the config.json that belongs to the checkpoint"
        )


def _collect(
    entry: _Entry, item: Mapped | None, dims: ParallelDims, geometry: Geometry, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The whole Hugging Face tensors of ``entry`` on the CPU of rank 0; an empty list on every other rank.

    Args:
        item: this rank's parameter of that name, if it has one.
    """
    if item is not None and entry.source == _first_tensor_rank(dims):
        local = item.parameter.detach().to(dtype)
        shards = _gather_shards(local, dims) if item.rule.sharded else [local]
        if dims.tp_rank != 0:
            return []
        tensors = item.rule.merge(shards, geometry=geometry)
        if dims.rank == 0:
            # Copies: what is yielded must neither alias a parameter nor share one storage among several tensors.
            return [tensor.clone(memory_format=torch.contiguous_format).cpu() for tensor in tensors]
        # Straight to rank 0, over the group of all ranks: an expert's stage group need not hold rank 0.
        for tensor in tensors:
            dist.send(tensor.contiguous(), dst=0)
        return []
    if dims.rank != 0:
        return []
    received = [torch.empty(shape, dtype=dtype, device=dims.device) for _, shape in entry.hf]
    for tensor in received:
        dist.recv(tensor, src=entry.source)
    return [tensor.cpu() for tensor in received]


def _gather_shards(local: torch.Tensor, dims: ParallelDims) -> list[torch.Tensor]:
    """All tensor parallel shards on the group's first rank; this rank's own on the others."""
    if dims.tp_size == 1:
        return [local]
    shards = None
    if dims.tp_rank == 0:
        shards = [torch.empty_like(local) for _ in range(dims.tp_size)]
    dist.gather(local.contiguous(), shards, dst=_first_tensor_rank(dims), group=dims.pg_collection.tp)
    return shards or [local]
