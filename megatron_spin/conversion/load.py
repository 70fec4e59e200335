"""Hugging Face weights into a Megatron model of any tensor and pipeline parallel layout, one parameter at a time."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_spin.conversion.parameters import Mapped, mapped_parameters
from megatron_spin.errors import CheckpointError
from megatron_spin.hf.files import DTYPES, TensorFiles, read_hf_config
from megatron_spin.hf.identity import is_buffer, is_tied_copy
from megatron_spin.models.families import family_of
from megatron_spin.models.rules import Geometry
from megatron_spin.parallel.collectives import gather_objects, raised_everywhere
from megatron_spin.parallel.dims import ParallelDims


@torch.no_grad()
def load_hf(model: Sequence[torch.nn.Module], hf_dir: Path, dims: ParallelDims, *, through: str | None = None) -> None:
    """Fills ``model`` (this rank's chunks) with the weights in ``hf_dir``, cast to the parameters' dtype; a collective.

    Each rank reads only the tensors of its own pipeline stage and holds one parameter's at a time. Rows that pad the vocabulary become
    zero; the last stage's copy of a tied embedding is filled too. Names and shapes are checked against the headers of the files before
    anything is written, and an error of one rank is raised by all.

    Args:
        through: a dtype (``fp32`` or ``bf16``) that the weights are rounded to first: what an engine that runs in it would hold.

    Raises:
        CheckpointError: a tensor is missing, has no place in the model or has another shape; a parameter has no rule; a corrupted file.
    """
    with contextlib.ExitStack() as stack:
        with raised_everywhere(dims):
            files = stack.enter_context(TensorFiles(hf_dir))
            config = read_hf_config(hf_dir)
            geometry = Geometry.from_hf(config)
            mapped = mapped_parameters(model, family=family_of(config), geometry=geometry)
            for item in mapped:
                _check_tensors(item, files, geometry=geometry, tp_size=dims.tp_size)
        used = set().union(*gather_objects({name for item in mapped for name in item.hf_names}, dims))
        with raised_everywhere(dims):
            _check_all_used(files, used, tied=geometry.tied)
            for item in mapped:
                _fill(item, files, geometry=geometry, dims=dims, through=through)


def _check_tensors(item: Mapped, files: TensorFiles, *, geometry: Geometry, tp_size: int) -> None:
    present = set(files.names)
    for name, shape in zip(
        item.hf_names, item.rule.hf_shapes(item.shape, tp_size=tp_size, geometry=geometry), strict=True
    ):
        if name not in present:
            raise CheckpointError(
                f"tensor {name} is missing in {files.directory}: it fills Megatron's {item.name}; copy the model again"
            )
        if files.shape(name) != shape:
            raise CheckpointError(
                f"tensor {name} in {files.directory} has shape {files.shape(name)}, but the model needs {shape}: "
                "its config.json or model.transformer is of another model"
            )


def _check_all_used(files: TensorFiles, used: set[str], *, tied: bool) -> None:
    for name in files.names:
        if name in used or is_buffer(name):
            continue
        if not is_tied_copy(name, tied=tied):
            raise CheckpointError(
                f"tensor {name} in {files.directory} has no place in the model: its config.json or model.transformer is of another model"
            )
        if not torch.equal(files.read(name), files.read("model.embed_tokens.weight")):
            raise CheckpointError(
                f"tensor {name} in {files.directory} differs from model.embed_tokens.weight, though config.json ties them: "
                "set tie_word_embeddings to false or remove the tensor"
            )


def _fill(item: Mapped, files: TensorFiles, *, geometry: Geometry, dims: ParallelDims, through: str | None) -> None:
    tensors = [files.read(name) if through is None else files.read(name).to(DTYPES[through]) for name in item.hf_names]
    shard = item.rule.split(tensors, rank=dims.tp_rank, tp_size=dims.tp_size, local=item.shape, geometry=geometry)
    if tuple(shard.shape) != item.shape:
        raise CheckpointError(
            f"tensors {', '.join(item.hf_names)} make a shard of shape {tuple(shard.shape)}, but Megatron's {item.name} is {item.shape}: "
            "config.json and model.transformer disagree on heads or sizes"
        )
    item.parameter.copy_(shard)
