"""The parameters of a Megatron model by their names in the whole model, each with its rule."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_spin.models.family import Family
from megatron_spin.models.rules import Geometry, Rule, Shape, global_expert
from megatron_spin.parallel.dims import ParallelDims

_LAYER = re.compile(r"^(.*\.layers)\.(\d+)\.(.*)$")


@dataclasses.dataclass(frozen=True)
class Mapped:
    """One parameter of this rank and how it converts."""

    name: str
    """Megatron's name, with the numbers of layer and expert in the whole model, from 0."""
    order: tuple[int, int, int, int]
    """Place in the export: embedding, layers in order, final norm, output; within a layer as in the family's table."""
    layer: int | None
    """None outside the layers."""
    expert: int | None
    """The expert's number in its layer; None for a parameter that every expert parallel rank holds."""
    rule: Rule
    hf_names: tuple[str, ...]
    parameter: torch.Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.parameter.shape)


def mapped_parameters(
    model: Sequence[torch.nn.Module], *, family: Family, geometry: Geometry, dims: ParallelDims
) -> list[Mapped]:
    """All parameters of this rank's model chunks, in the order of export.

    Raises:
        CheckpointError: a parameter has no rule in ``family``.
    """
    mapped = []
    for name, parameter in global_named_parameters(model):
        match = family.find(name, tied=geometry.tied)
        expert = match.expert
        if expert is not None:
            expert = global_expert(expert, ep_rank=dims.ep_rank, ep_size=dims.ep_size, num_experts=geometry.num_experts)
        behind_layers = match.layer is None and match.pattern != family.embedding
        mapped.append(
            Mapped(
                name=match.pattern.format(layer=match.layer, expert=expert),
                order=(int(behind_layers), _number(match.layer), match.position, _number(expert)),
                layer=match.layer,
                expert=expert,
                rule=match.rule,
                hf_names=match.rule.hf_names(layer=match.layer, expert=expert),
                parameter=parameter,
            )
        )
    return sorted(mapped, key=lambda item: item.order)


def _number(number: int | None) -> int:
    return -1 if number is None else number


def global_named_parameters(model: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, parameter) of all chunks; layers are numbered in the whole model, from 0.

    Experts keep the number that their expert parallel rank gives them.
    """
    for chunk in model:
        core = unwrap(chunk)
        for name, parameter in core.named_parameters():
            match = _LAYER.match(name)
            if match:
                stack, local, rest = match.groups()
                # Each pipeline stage and chunk counts its own layers from 0; the layer itself knows its number in the
                # model, from 1.
                layer: Any = core.get_submodule(f"{stack}.{local}")
                name = f"{stack}.{layer.layer_number - 1}.{rest}"
            yield name, parameter


def finish_param_gather(model: Sequence[torch.nn.Module]) -> None:
    """Lets the parameters of ``model`` be those after the last step; a collective.

    With ``overlap_param_gather`` a data parallel rank has only its own share of them until the next forward pass, whose
    hooks gather the rest. Whoever reads or writes parameters by other means than a forward pass calls this first.
    """
    for chunk in model:
        ddp: Any = chunk
        config = getattr(ddp, "ddp_config", None)  # of Megatron's DistributedDataParallel alone
        if config is not None and config.overlap_param_gather:
            ddp.start_param_sync(force_sync=True)


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel and Float16Module."""
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
        chunk = inner
    return chunk
