"""A Megatron model of any layout as Hugging Face tensors, one at a time on rank 0."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_spin.conversion.parameters import Mapped, finish_param_gather, mapped_parameters
from megatron_spin.errors import CheckpointError
from megatron_spin.hf.files import DTYPES
from megatron_spin.hf.identity import tensor_digest
from megatron_spin.models.families import family_of
from megatron_spin.models.family import Family, HfConfig
from megatron_spin.models.rules import Geometry, Rule, Shape
from megatron_spin.parallel.collectives import gather_objects, raised_everywhere
from megatron_spin.parallel.dims import ParallelDims


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One parameter as all ranks see it: when it is due, who sends it and what becomes of it."""

    order: tuple[int, int, int, int]
    sources: tuple[int, ...]
    """The ranks that send its shards to rank 0, in the order of the shards; one rank if it is not sharded."""
    name: str
    layer: int | None
    expert: int | None
    rule: Rule
    shape: Shape
    """Of each shard."""
    hf: tuple[tuple[str, Shape], ...]


class HfStream:
    """The model's weights as (Hugging Face name, CPU tensor in ``dtype``), in the order of the layers; a collective.

    One parameter at a time, the tensor parallel ranks of the pipeline stage (and of the expert parallel rank) that
    holds it send their shards to rank 0, which merges them. Only rank 0 yields, but every rank must iterate to the end
    (``for _ in HfStream(...): pass``). Padding of the vocabulary is never yielded, nor is the copy of a tied
    embedding, which must equal the original. A tensor may share its memory with the model: copy what is to be kept.

    Args:
        model: this rank's chunks.
        hf_config: the model's ``config.json``.
        dtype: ``fp32`` or ``bf16``.

    Raises:
        CheckpointError: a parameter has no rule, layers or experts are missing, or the copies of a tied embedding
            differ (at the end of the iteration, on every rank).
    """

    def __init__(self, model: Sequence[torch.nn.Module], hf_config: HfConfig, dims: ParallelDims, dtype: str) -> None:
        self._dims = dims
        self._dtype = dtype
        self._family = family_of(hf_config)
        finish_param_gather(model)
        with raised_everywhere(dims):
            self._geometry = self._family.geometry(hf_config)
            mapped = mapped_parameters(model, family=self._family, geometry=self._geometry, dims=dims)
            own = _entries(mapped, dims, self._geometry)
        # Stages and expert ranks hold different parameters: after both gathers every rank knows all of them.
        for group, size in ((dims.pg_collection.pp, dims.pp_size), (dims.pg_collection.ep, dims.ep_size)):
            if size > 1:
                own = list(itertools.chain.from_iterable(gather_objects(own, dims, group)))
        # The same order on every rank, so that sends and receives match.
        self._all_entries = sorted(own, key=lambda entry: (entry.order, entry.sources))
        with raised_everywhere(dims):
            _check_complete(self._all_entries, self._family, self._geometry)
        self._items = {item.name: item for item in mapped}

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors by name, in the order in which they come."""
        return {name: shape for entry in self._all_entries if not self._is_copy(entry) for name, shape in entry.hf}

    def _is_copy(self, entry: _Entry) -> bool:
        return self._geometry.tied and entry.name == self._family.output

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        digests: dict[str, str] = {}
        if self._dims.expert_dp_rank == 0:  # the other ranks' weights are the same, experts included
            for entry in self._all_entries:
                tensors = self._collect(entry)
                if self._dims.rank != 0:
                    continue
                if self._geometry.tied and entry.name in (self._family.embedding, self._family.output):
                    digests[entry.name] = tensor_digest(tensors[0], self._dtype)
                if self._is_copy(entry):
                    continue
                for name, _ in entry.hf:
                    yield name, tensors.pop(0)  # not kept here while the next one comes
        with raised_everywhere(self._dims):
            if len(set(digests.values())) > 1:
                raise CheckpointError(
                    "the last pipeline stage's copy of the tied embedding differs from the first stage's: the model "
                    "was trained without reducing their gradients, so it has no Hugging Face form; train it again"
                )

    @torch.no_grad()
    def _collect(self, entry: _Entry) -> list[torch.Tensor]:
        """The whole Hugging Face tensors of ``entry`` on the CPU of rank 0; an empty list on every other rank."""
        dims = self._dims
        if dims.rank != 0:
            if dims.rank in entry.sources:
                # Over the group of all ranks: no smaller one need hold rank 0 and an expert's rank.
                dist.send(self._shard(entry), dst=0)
                if dims.device.type == "cuda":
                    # NCCL only enqueues. A rank that ran ahead would hold the casts of its whole stage until rank 0 has
                    # taken them.
                    torch.cuda.synchronize(dims.device)
            return []
        shards = []
        for source in entry.sources:
            if source == 0:
                shards.append(self._shard(entry))
            else:
                shards.append(torch.empty(entry.shape, dtype=DTYPES[self._dtype], device=dims.device))
                dist.recv(shards[-1], src=source)
        return [tensor.contiguous().cpu() for tensor in entry.rule.merge(shards, geometry=self._geometry)]

    def _shard(self, entry: _Entry) -> torch.Tensor:
        return self._items[entry.name].parameter.detach().to(DTYPES[self._dtype]).contiguous()


def _entries(mapped: Sequence[Mapped], dims: ParallelDims, geometry: Geometry) -> list[_Entry]:
    """What this rank's tensor parallel group has to send."""
    ranks = tuple(dist.get_process_group_ranks(dims.pg_collection.tp)) if dims.tp_size > 1 else (dims.rank,)
    entries = []
    for item in mapped:
        if item.expert is None and dims.ep_rank != 0:
            continue  # expert parallel rank 0 sends what all of them hold
        shapes = item.rule.hf_shapes(item.shape, tp_size=dims.tp_size, geometry=geometry)
        entries.append(
            _Entry(
                order=item.order,
                sources=ranks if item.rule.sharded else ranks[:1],
                name=item.name,
                layer=item.layer,
                expert=item.expert,
                rule=item.rule,
                shape=item.shape,
                hf=tuple(zip(item.hf_names, shapes, strict=True)),
            )
        )
    return entries


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
