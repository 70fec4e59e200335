"""Hugging Face weights into a Megatron model of any layout, one parameter at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_spin.conversion.parameters import Mapped, mapped_parameters
from megatron_spin.errors import CheckpointError
from megatron_spin.hf.assets import read_hf_config
from megatron_spin.hf.files import DTYPES, TensorFiles
from megatron_spin.hf.identity import is_buffer
from megatron_spin.models.families import family_of
from megatron_spin.models.family import Family
from megatron_spin.models.rules import Geometry
from megatron_spin.parallel.collectives import gather_objects, raised_everywhere
from megatron_spin.parallel.dims import ParallelDims


@torch.no_grad()
def load_hf(model: Sequence[torch.nn.Module], hf_dir: Path, dims: ParallelDims, *, through: str | None = None) -> None:
    """Fills ``model`` (this rank's chunks) with the weights in ``hf_dir``, cast to the parameters' dtype; a collective.

    Each rank reads only the tensors that it holds a part of, and holds one parameter's at a time. Rows that pad the
    vocabulary become zero; the last stage's copy of a tied embedding is filled too. Names and shapes are checked
    against the headers of the files before anything is written, and an error of one rank is raised by all.

    Args:
        through: a dtype (``fp32`` or ``bf16``) that the weights are rounded to first: what an engine that runs in it
            would hold.

    Raises:
        CheckpointError: a tensor is missing, has no place in the model or has another shape; a parameter has no rule; a
            file is corrupted.
    """
    with raised_everywhere(dims):
        files = TensorFiles(hf_dir)
        hf_config = read_hf_config(hf_dir)
        family = family_of(hf_config)
        geometry = family.geometry(hf_config)
        mapped = mapped_parameters(model, family=family, geometry=geometry, dims=dims)
        for item in mapped:
            _check_tensors(item, files, geometry=geometry, tp_size=dims.tp_size)
    own = {name for item in mapped for name in item.hf_names}
    used = set().union(*gather_objects(own, dims))
    with raised_everywhere(dims):
        _check_all_used(files, used, family=family, tied=geometry.tied)
        for item in mapped:
            _fill(item, files, geometry=geometry, dims=dims, through=through)


def _check_tensors(item: Mapped, files: TensorFiles, *, geometry: Geometry, tp_size: int) -> None:
    shapes = item.rule.hf_shapes(item.shape, tp_size=tp_size, geometry=geometry)
    for name, shape in zip(item.hf_names, shapes, strict=True):
        if name not in files:
            raise CheckpointError(
                f"tensor {name} is missing in {files.directory}: it fills Megatron's {item.name}; copy the model again"
            )
        if files.shape(name) != shape:
            raise CheckpointError(
                f"tensor {name} in {files.directory} has shape {files.shape(name)}, but the model needs {shape}: "
                "its config.json or model.transformer is of another model"
            )


def _check_all_used(files: TensorFiles, used: set[str], *, family: Family, tied: bool) -> None:
    [embedding] = family.rules[family.embedding].hf
    for name in files.names:
        if name in used or is_buffer(name):
            continue
        if not family.is_tied_copy(name, tied=tied):
            raise CheckpointError(
                f"tensor {name} in {files.directory} has no place in the model: "
                "its config.json or model.transformer is of another model"
            )
        if not torch.equal(files.read(name), files.read(embedding)):
            raise CheckpointError(
                f"tensor {name} in {files.directory} differs from {embedding}, though config.json ties them: "
                "set tie_word_embeddings to false or remove the tensor"
            )


def _fill(item: Mapped, files: TensorFiles, *, geometry: Geometry, dims: ParallelDims, through: str | None) -> None:
    tensors = []
    for name in item.hf_names:
        tensor = files.read(name)
        tensors.append(tensor if through is None else tensor.to(DTYPES[through]))
    shard = item.rule.split(tensors, tp_rank=dims.tp_rank, tp_size=dims.tp_size, local=item.shape, geometry=geometry)
    if tuple(shard.shape) != item.shape:
        raise CheckpointError(
            f"tensors {', '.join(item.hf_names)} make a shard of shape {tuple(shard.shape)}, but Megatron's "
            f"{item.name} is {item.shape}: config.json and model.transformer disagree on heads or sizes"
        )
    item.parameter.copy_(shard)
