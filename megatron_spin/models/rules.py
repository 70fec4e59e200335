"""Rules: how Hugging Face tensors become one tensor parallel rank's Megatron parameter, and back. Pure; no process group.

A rule is a frozen dataclass. ``split`` takes the whole Hugging Face tensors and gives rank ``rank``'s shard; ``merge`` takes all shards and
gives the Hugging Face tensors. They are inverse for every tensor parallel size, which the property tests check.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_spin.errors import CheckpointError

Shape = tuple[int, ...]


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

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Geometry":
        """Reads a ``config.json``.

        Raises:
            CheckpointError: a size is missing.
        """
        try:
            heads = config["num_attention_heads"]
            return Geometry(
                num_layers=config["num_hidden_layers"],
                num_attention_heads=heads,
                num_query_groups=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocab_size=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise CheckpointError(
                f"config.json has no {error.args[0]}: use the config.json that came with the model"
            ) from None


@dataclasses.dataclass(frozen=True)
class Rule:
    """``hf``: Hugging Face names of the tensors that make up the parameter; ``{layer}`` stands for the layer's number, from 0."""

    hf: tuple[str, ...]

    sharded = True
    """Whether tensor parallel ranks hold different parts."""

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        return tuple(name.format(layer=layer) for name in self.hf)

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        """Shapes of the Hugging Face tensors, given the ``local`` shape of the parameter on one of ``tp_size`` ranks."""
        raise NotImplementedError

    def split(self, tensors: Sequence[Tensor], *, rank: int, tp_size: int, local: Shape, geometry: Geometry) -> Tensor:
        """Rank ``rank``'s shard, of shape ``local``, of the whole ``tensors``."""
        raise NotImplementedError

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        """The whole Hugging Face tensors of all ranks' ``shards``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Direct(Rule):
    """The same tensor on every rank: norms and biases behind a row-parallel matrix."""

    sharded = False

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        return [local]

    def split(self, tensors: Sequence[Tensor], *, rank: int, tp_size: int, local: Shape, geometry: Geometry) -> Tensor:
        return tensors[0]

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        return [shards[0]]


@dataclasses.dataclass(frozen=True)
class ColumnParallel(Rule):
    """Output features ([out, in] or [out]) shared out in order."""

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        return [(local[0] * tp_size, *local[1:])]

    def split(self, tensors: Sequence[Tensor], *, rank: int, tp_size: int, local: Shape, geometry: Geometry) -> Tensor:
        return tensors[0].chunk(tp_size, dim=0)[rank]

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        return [torch.cat(list(shards), dim=0)]


@dataclasses.dataclass(frozen=True)
class RowParallel(Rule):
    """Input features (dimension 1 of [out, in]) shared out in order."""

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        return [(local[0], local[1] * tp_size)]

    def split(self, tensors: Sequence[Tensor], *, rank: int, tp_size: int, local: Shape, geometry: Geometry) -> Tensor:
        return tensors[0].chunk(tp_size, dim=1)[rank]

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        return [torch.cat(list(shards), dim=1)]


@dataclasses.dataclass(frozen=True)
class VocabParallel(Rule):
    """Rows of the vocabulary shared out in order, with zero rows behind the last real token, which are never merged back."""

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        # Where the model is too small for the vocabulary, its own size is what can be filled.
        return [(min(geometry.vocab_size, local[0] * tp_size), *local[1:])]

    def split(self, tensors: Sequence[Tensor], *, rank: int, tp_size: int, local: Shape, geometry: Geometry) -> Tensor:
        rows = tensors[0][rank * local[0] : (rank + 1) * local[0]]
        padding = rows.new_zeros((local[0] - rows.shape[0], *rows.shape[1:]))
        return torch.cat([rows, padding], dim=0)

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        return [torch.cat(list(shards), dim=0)[: geometry.vocab_size]]


@dataclasses.dataclass(frozen=True)
class QueryKeyValue(Rule):
    """Megatron's ``linear_qkv``: by query group, its queries, then its key, then its value; ``hf`` names q, k and v.

    Ranks take contiguous rows. With fewer groups than ranks, a rank's rows end within a group; Megatron gathers them when it runs.
    """

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        query, key = geometry.num_attention_heads * geometry.head_dim, geometry.num_query_groups * geometry.head_dim
        return [(query, *local[1:]), (key, *local[1:]), (key, *local[1:])]

    def split(self, tensors: Sequence[Tensor], *, rank: int, tp_size: int, local: Shape, geometry: Geometry) -> Tensor:
        groups = [tensor.reshape(geometry.num_query_groups, -1, *tensor.shape[1:]) for tensor in tensors]
        interleaved = torch.cat(groups, dim=1).flatten(0, 1)
        return interleaved[rank * local[0] : (rank + 1) * local[0]]

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        interleaved = torch.cat(list(shards), dim=0)
        groups = interleaved.reshape(geometry.num_query_groups, -1, *interleaved.shape[1:])
        queries = geometry.num_attention_heads // geometry.num_query_groups * geometry.head_dim
        return [part.flatten(0, 1) for part in groups.split([queries, geometry.head_dim, geometry.head_dim], dim=1)]


@dataclasses.dataclass(frozen=True)
class GateUp(Rule):
    """Megatron's ``linear_fc1`` of a gated MLP: each rank holds its part of the gate, then its part of the up projection."""

    def hf_shapes(self, local: Shape, *, tp_size: int, geometry: Geometry) -> list[Shape]:
        return [(local[0] // 2 * tp_size, *local[1:])] * 2

    def split(self, tensors: Sequence[Tensor], *, rank: int, tp_size: int, local: Shape, geometry: Geometry) -> Tensor:
        return torch.cat([tensor.chunk(tp_size, dim=0)[rank] for tensor in tensors], dim=0)

    def merge(self, shards: Sequence[Tensor], *, geometry: Geometry) -> list[Tensor]:
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return [torch.cat([half[i] for half in halves], dim=0) for i in range(2)]
