"""Rules: how Hugging Face tensors become one rank's Megatron parameter, and back. Pure; no process group.

A rule is a frozen dataclass. ``split`` takes the whole Hugging Face tensors and gives one tensor parallel rank's shard;
``merge`` takes the shards of all ranks and gives the Hugging Face tensors. They are inverse for every tensor parallel
size, which the property tests check. Experts are whole parameters: each expert parallel rank holds some of a layer's
experts, and :func:`global_expert` says which.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_spin.errors import CheckpointError

Shape = tuple[int, ...]


def global_expert(local: int, *, ep_rank: int, ep_size: int, num_experts: int) -> int:
    """The number in its layer of the expert that rank ``ep_rank`` of ``ep_size`` counts as ``local``; all from 0.

    Megatron gives each expert parallel rank the same number of consecutive experts.
    """
    return ep_rank * (num_experts // ep_size) + local


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a model that rules need and that shapes alone do not tell."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads, Megatron's name."""
    head_dim: int
    vocab_size: int
    """Real tokens: Megatron's padding comes behind them."""
    tied: bool
    """The output layer is the embedding."""
    num_experts: int = 0
    """Experts of each mixture-of-experts layer; 0 for a dense model."""

    @staticmethod
    def from_hf(hf_config: dict[str, Any]) -> "Geometry":
        """Reads a ``config.json`` with the key names of Llama, which most families use.

        Raises:
            CheckpointError: a size is missing.
        """
        try:
            heads = hf_config["num_attention_heads"]
            return Geometry(
                num_layers=hf_config["num_hidden_layers"],
                num_attention_heads=heads,
                num_query_groups=hf_config.get("num_key_value_heads") or heads,
                head_dim=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
                vocab_size=hf_config["vocab_size"],
                tied=bool(hf_config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise CheckpointError(
                f"config.json has no {error.args[0]}: use the config.json that came with the model"
            ) from None


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the Hugging Face tensors ``hf`` make up one Megatron parameter.

    ``{layer}`` and ``{expert}`` in the names stand for the layer's number in the model and the expert's number in its
    layer, both from 0.
    """

    hf: tuple[str, ...]

    sharded = True
    """Whether tensor parallel ranks hold different parts."""

    def hf_names(self, *, layer: int | None = None, expert: int | None = None) -> tuple[str, ...]:
        """``hf`` with the numbers filled in."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.hf)

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        """Shapes of the Hugging Face tensors, given the parameter's ``local`` shape on each of ``tp_size`` ranks."""
        raise NotImplementedError

    def split(
        self, tensors: Sequence[Tensor], *, tp_rank: int, tp_size: int, local: Shape, geometry: Geometry
    ) -> Tensor:
        """The shard of shape ``local`` that rank ``tp_rank`` holds of the whole ``tensors``."""
        raise NotImplementedError

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        """The whole Hugging Face tensors of all ranks' ``shards``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Direct(Rule):
    """The same tensor on every rank: norms, and biases behind a row parallel matrix."""

    sharded = False

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        return [local]

    def split(
        self, tensors: Sequence[Tensor], *, tp_rank: int, tp_size: int, local: Shape, geometry: Geometry
    ) -> Tensor:
        return tensors[0]

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        return [shards[0]]


@dataclasses.dataclass(frozen=True)
class RowParallel(Rule):
    """Ranks hold consecutive input features: parts of dimension 1 of [out, in]."""

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        return [(local[0], local[1] * tp_size)]

    def split(
        self, tensors: Sequence[Tensor], *, tp_rank: int, tp_size: int, local: Shape, geometry: Geometry
    ) -> Tensor:
        return tensors[0].chunk(tp_size, dim=1)[tp_rank]

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        return [_whole(shards, dim=1)]


@dataclasses.dataclass(frozen=True)
class VocabParallel(Rule):
    """Ranks hold consecutive rows of the vocabulary.

    Zero rows pad it behind the last real token; they are never merged back.
    """

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        # A model with fewer rows than the vocabulary can only be filled up to its own size; the shapes then differ.
        return [(min(geometry.vocab_size, local[0] * tp_size), *local[1:])]

    def split(
        self, tensors: Sequence[Tensor], *, tp_rank: int, tp_size: int, local: Shape, geometry: Geometry
    ) -> Tensor:
        rows = tensors[0][tp_rank * local[0] : (tp_rank + 1) * local[0]]
        missing = local[0] - rows.shape[0]
        return torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))]) if missing else rows

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        return [_whole(shards, dim=0)[: geometry.vocab_size]]


@dataclasses.dataclass(frozen=True)
class QueryKeyValue(Rule):
    """Megatron's ``linear_qkv``: for each query group its queries, then its key, then its value; ``hf`` names q, k and
    v.

    Ranks hold consecutive rows. With fewer groups than ranks, a rank's rows end within a group; Megatron gathers them
    in its forward pass.
    """

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        query = geometry.num_attention_heads * geometry.head_dim
        key = geometry.num_query_groups * geometry.head_dim
        return [(query, *local[1:]), (key, *local[1:]), (key, *local[1:])]

    def split(
        self, tensors: Sequence[Tensor], *, tp_rank: int, tp_size: int, local: Shape, geometry: Geometry
    ) -> Tensor:
        groups = [tensor.reshape(geometry.num_query_groups, -1, *tensor.shape[1:]) for tensor in tensors]
        interleaved = torch.cat(groups, dim=1).flatten(0, 1)
        return interleaved[tp_rank * local[0] : (tp_rank + 1) * local[0]]

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        interleaved = _whole(shards, dim=0)
        groups = interleaved.reshape(geometry.num_query_groups, -1, *interleaved.shape[1:])
        queries = geometry.num_attention_heads // geometry.num_query_groups * geometry.head_dim
        return [part.flatten(0, 1) for part in groups.split([queries, geometry.head_dim, geometry.head_dim], dim=1)]


@dataclasses.dataclass(frozen=True)
class GateUp(Rule):
    """Megatron's ``linear_fc1`` of a gated MLP: each rank's part of the gate, then its part of the up projection."""

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        return [(local[0] // 2 * tp_size, *local[1:])] * 2

    def split(
        self, tensors: Sequence[Tensor], *, tp_rank: int, tp_size: int, local: Shape, geometry: Geometry
    ) -> Tensor:
        return torch.cat([tensor.chunk(tp_size, dim=0)[tp_rank] for tensor in tensors], dim=0)

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        gates, ups = zip(*(shard.chunk(2, dim=0) for shard in shards), strict=True)
        return [_whole(gates, dim=0), _whole(ups, dim=0)]


def _whole(shards: Sequence[Tensor], *, dim: int) -> Tensor:
    """The shards one behind the other; a single one itself, since the copy of an embedding is large."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)
