"""The parameters of a Megatron model by their names in the whole model, each with its rule."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_spin.models.families import Family
from megatron_spin.models.rules import Geometry, Rule, Shape

_LAYER = re.compile(r"^(.*\.layers)\.(\d+)\.(.*)$")


@dataclasses.dataclass(frozen=True)
class Mapped:
    """One parameter of this rank and how it converts."""

    name: str
    """Megatron's name, with the layer's number in the whole model, from 0."""
    order: tuple[int, int, int]
    """Place in the export: embedding, layers in order, final norm, output."""
    rule: Rule
    hf_names: tuple[str, ...]
    parameter: torch.Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.parameter.shape)


def mapped_parameters(model: Sequence[torch.nn.Module], *, family: Family, geometry: Geometry) -> list[Mapped]:
    """All parameters of this rank's model chunks, in the order of export.

    Raises:
        CheckpointError: a parameter has no rule in ``family``.
    """
    mapped = []
    for name, parameter in global_named_parameters(model):
        layer, position, rule = family.find(name, geometry)
        order = (0 if layer >= 0 or name == family.embedding else 1, layer, position)
        mapped.append(Mapped(name, order, rule, rule.hf_names(layer if layer >= 0 else None), parameter))
    return sorted(mapped, key=lambda item: item.order)


def global_named_parameters(model: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, parameter) of all chunks; layers are numbered in the whole model, from 0, by their own ``layer_number`` (from 1)."""
    for chunk in model:
        core = unwrap(chunk)
        for name, parameter in core.named_parameters():
            match = _LAYER.match(name)
            if match:
                stack, _, rest = match.groups()
                # A pipeline stage or an interleaved chunk counts its own layers from 0; the layer itself knows where it stands.
                layer: Any = core.get_submodule(f"{stack}.{match[2]}")
                name = f"{stack}.{int(layer.layer_number) - 1}.{rest}"
            yield name, parameter


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel and Float16Module."""
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
        chunk = inner
    return chunk
