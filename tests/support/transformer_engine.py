"""Transformer Engine's layers and optimizer on a CPU: constructed, converted and checkpointed, but never run.

For the ranks of a world of its own: the CPU adapter hides Transformer Engine from a process that has not imported it
before, and a process that has must not run Megatron's layers.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from megatron_spin.config import Config

Spec: TypeAlias = Literal["local", "transformer_engine"]
Layout: TypeAlias = dict[str, Any]
"""The section ``parallel``."""


def config_of(hf_dir: Path, layout: Layout, spec: Spec, **sections: Any) -> Config:
    from tests.support.ranks import tiny_config

    return tiny_config(hf_dir, parallel=layout, layer_spec=spec, **sections)


def build(config: Config) -> tuple[list[Any], Any]:
    """(model filled with NaN, dims) of this rank."""
    import transformer_engine.pytorch  # noqa: F401 # before the CPU adapter, which hides it otherwise

    from megatron_spin.parallel.setup import choose_device, initialize

    device = choose_device("cpu")
    from megatron_spin.models.provider import build_model

    dims = initialize(config.parallel, device)
    with _as_on_a_gpu():
        model = build_model(config, dims)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    return list(model), dims


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Transformer Engine constructs no module where torch sees no GPU."""
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = is_available


def parameters_of(hf_dir: Path, layout: Layout, spec: Spec) -> dict[tuple[str, ...], dict[str, Any]]:
    """What this rank's parameters are, by the names of the Hugging Face tensors that fill them.

    Raises:
        CheckpointError: the family's table lacks a parameter.
    """
    model, dims = build(config_of(hf_dir, layout, spec))
    from megatron_spin.conversion.parameters import mapped_parameters
    from megatron_spin.hf.assets import read_hf_config
    from megatron_spin.models.families import family_of

    hf_config = read_hf_config(hf_dir)
    family = family_of(hf_config)
    facts = {}
    for item in mapped_parameters(model, family=family, geometry=family.geometry(hf_config), dims=dims):
        facts[item.hf_names] = {
            "shape": item.shape,
            "dtype": item.parameter.dtype,
            "sequence_parallel": bool(getattr(item.parameter, "sequence_parallel", False)),
            "tensor_model_parallel": getattr(item.parameter, "tensor_model_parallel", None),
            "partition_dim": getattr(item.parameter, "partition_dim", None),
        }
    return facts


def sharded_keys(hf_dir: Path, layout: Layout, spec: Spec) -> set[str]:
    """Keys of this rank's tensors in a checkpoint; extra states, which only FP8 fills, are left out."""
    [chunk], _ = build(config_of(hf_dir, layout, spec))
    keys = {entry.key for entry in chunk.sharded_state_dict().values()}
    return {key for key in keys if not key.endswith("._extra_state")}


def roundtrip(hf_dir: Path, out_dir: Path, layout: Layout) -> None:
    """Hugging Face -> Transformer Engine -> Hugging Face, compared bit for bit on rank 0."""
    model, dims = build(config_of(hf_dir, layout, "transformer_engine"))
    from megatron_spin.conversion.export import export_hf
    from megatron_spin.conversion.load import load_hf
    from tests.support.roundtrip import assert_same_model

    load_hf(model, hf_dir, dims)
    export_hf(model, hf_dir, out_dir, dims, "fp32")
    if dims.rank == 0:
        assert_same_model(out_dir, hf_dir)


def write_checkpoint(hf_dir: Path, directory: Path, layout: Layout, spec: Spec) -> None:
    """Saves a model of ``spec`` that holds the weights of ``hf_dir``."""
    model, dims = build(config_of(hf_dir, layout, spec))
    from megatron_spin.conversion.load import load_hf
    from megatron_spin.training.checkpoint import save_checkpoint

    load_hf(model, hf_dir, dims)
    save_checkpoint(directory, 0, model, dims=dims)


def export_checkpoint(hf_dir: Path, directory: Path, out_dir: Path, layout: Layout, spec: Spec) -> None:
    """Loads a checkpoint into a model of ``spec``, exports that and compares it with ``hf_dir`` on rank 0."""
    model, dims = build(config_of(hf_dir, layout, spec))
    from megatron_spin.conversion.export import export_hf
    from megatron_spin.training.checkpoint import load_checkpoint
    from tests.support.roundtrip import assert_same_model

    load_checkpoint(directory, model, dims=dims)
    export_hf(model, hf_dir, out_dir, dims, "fp32")
    if dims.rank == 0:
        assert_same_model(out_dir, hf_dir)


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """What a rank's optimizer held before a save, and a fresh one after a load."""

    kind: str
    """The class of the optimizer inside Megatron's."""
    bias_correction: bool
    saved: list[dict[str, torch.Tensor]]
    """Moments and main weights of each parameter of this rank's share."""
    loaded: list[dict[str, torch.Tensor]]
    saved_steps: list[int]
    """Of each parameter group."""
    loaded_steps: list[int]
    carried_over: list[dict[str, torch.Tensor]]
    """What another fresh one holds after a load of the checkpoint that an iteration ends with."""


def optimizer_roundtrip(hf_dir: Path, directory: Path, name: str, dtype: str) -> OptimizerState:
    """Saves an optimizer as it is after three steps, and loads it into fresh ones."""
    config = config_of(
        hf_dir, {}, "transformer_engine", precision={"dtype": dtype}, training={"optimizer": {"optimizer": name}}
    )
    model, optimizer, dims = _optimized(config)
    from megatron_spin.training.checkpoint import load_checkpoint, save_checkpoint
    from megatron_spin.training.optimizer_state import inner_optimizers

    inner: Any
    [inner] = inner_optimizers(optimizer)
    generator = torch.Generator().manual_seed(dims.rank)
    for group in inner.param_groups:
        group["step"] = 3
        for parameter in group["params"]:
            inner.initialize_state(parameter, False)
            if dtype == "bf16":
                parameter.data.add_(1e-5)  # what the model's own copy cannot hold
            for moment in ("exp_avg", "exp_avg_sq"):
                state = inner.state[parameter][moment]
                state.copy_(torch.rand(state.shape, generator=generator))
    saved = _state(inner)
    save_checkpoint(directory, 3, model, dims=dims, optimizer=optimizer)
    save_checkpoint(directory / "last", 3, model, dims=dims, optimizer=optimizer, moments=False)

    model, optimizer, dims = _optimized(config)
    load_checkpoint(directory, model, dims=dims, optimizer=optimizer)
    [loaded] = inner_optimizers(optimizer)
    model, optimizer, dims = _optimized(config)
    load_checkpoint(directory / "last", model, dims=dims, optimizer=optimizer, moments=False)
    [carried_over] = inner_optimizers(optimizer)
    return OptimizerState(
        kind=type(inner).__name__,
        bias_correction=bool(inner.param_groups[0]["bias_correction"]),
        saved=saved,
        loaded=_state(loaded),
        saved_steps=_steps(inner),
        loaded_steps=_steps(loaded),
        carried_over=_state(carried_over),
    )


def _optimized(config: Config) -> tuple[Any, Any, Any]:
    """(model, optimizer, dims) with the weights of ``config.model.hf``."""
    chunks, dims = build(config)
    from megatron_spin.conversion.load import load_hf
    from megatron_spin.training.optimizer import wrap_and_optimize

    model, optimizer = wrap_and_optimize(chunks, config, dims=dims, learning_rate=1e-3)
    load_hf(model, Path(config.model.hf), dims)
    optimizer.reload_model_params()
    return model, optimizer, dims


def _state(inner: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """Copies of what the optimizer keeps for each parameter, with its main weight as ``param``."""
    states = []
    for group in inner.param_groups:
        for parameter in group["params"]:
            kept = {name: value for name, value in inner.state[parameter].items() if isinstance(value, torch.Tensor)}
            states.append({name: value.detach().clone() for name, value in {**kept, "param": parameter}.items()})
    return states


def _steps(inner: torch.optim.Optimizer) -> list[int]:
    return [int(group.get("step", 0)) for group in inner.param_groups]
