"""The device, the process groups and what can be checked before they exist."""

import dataclasses
import datetime
import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version

from megatron_spin.config import Config, ParallelConfig
from megatron_spin.errors import ConfigError, DeviceError
from megatron_spin.machine import version_of
from megatron_spin.parallel import cpu_device

TIMEOUT = datetime.timedelta(minutes=30)


@dataclasses.dataclass(frozen=True)
class ParallelDims:
    """This process's place in the layout; passed to whoever needs it, keyword-only."""

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    pg_collection: Any
    """Megatron's ``ProcessGroupCollection``."""

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def choose_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process, made ready for Megatron; call it before anything imports ``megatron.core``.

    Raises:
        DeviceError: ``cuda`` was asked for and is not there, or there are fewer GPUs than local ranks.
    """
    cpu_device.check_version()
    # Megatron's overlap of tensor parallel communication needs one hardware queue; CUDA reads this when its context is made.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise DeviceError(
            "device=cuda, but PyTorch sees no GPU: set device: cpu, or install a CUDA build of PyTorch and a driver"
        )
    if device == "cpu" or not available:
        cpu_device.install()
        return torch.device("cpu")
    refuse_wrong_apex()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError(
            f"local rank {local_rank} has no GPU of its own, this machine has {count}: start one process a GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def initialize(parallel: ParallelConfig, device: torch.device, *, seed: int = 0) -> ParallelDims:
    """Joins the process group that torchrun's environment describes (a group of one without it) and lays out Megatron's groups.

    May be called again in the same process with another layout. ``seed`` is of Megatron's generators (initialization; there is no dropout).
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        alone = "WORLD_SIZE" not in os.environ
        store = torch.distributed.HashStore() if alone else None
        place: dict[str, Any] = {"rank": 0, "world_size": 1, "store": store} if alone else {}
        torch.distributed.init_process_group(backend, timeout=TIMEOUT, **place)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with cpu_device.megatron_region():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
        )
        model_parallel_cuda_manual_seed(seed + 1)
    return ParallelDims(
        device=device,
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def check_layout(config: Config, hf_config: dict[str, Any], *, world_size: int) -> None:
    """Refuses a model or a batch that cannot be cut as configured; needs no process group.

    Raises:
        ConfigError: everything that :func:`layout_errors` found, in one line.
    """
    errors = layout_errors(config, hf_config, world_size=world_size)
    if errors:
        raise ConfigError("; ".join(errors))


def layout_errors(config: Config, hf_config: dict[str, Any], *, world_size: int) -> list[str]:
    """All reasons why the model and the batch cannot be cut over ``world_size`` processes, each with every factor; empty if they can."""
    parallel, training = config.parallel, config.training
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    missing = [
        name for name in ("num_attention_heads", "num_hidden_layers", "intermediate_size") if not hf_config.get(name)
    ]
    if missing:
        return [
            f"the model's config.json lacks {name}: write it with transformers' save_pretrained" for name in missing
        ]
    heads, layers = hf_config["num_attention_heads"], hf_config["num_hidden_layers"]
    groups, errors = hf_config.get("num_key_value_heads") or heads, []
    for name, value in {"num_attention_heads": heads, "intermediate_size": hf_config["intermediate_size"]}.items():
        if value % tp:
            errors.append(
                f"parallel.tensor_model_parallel_size={tp} does not divide the model's {name}={value}: choose a divisor"
            )
    if groups % tp and tp % groups:
        errors.append(
            f"parallel.tensor_model_parallel_size={tp} and the model's num_key_value_heads={groups} do not divide each other: "
            "choose a divisor or a multiple"
        )
    if layers % pp:
        errors.append(
            f"parallel.pipeline_model_parallel_size={pp} does not divide the model's num_hidden_layers={layers}: choose a divisor"
        )
    if parallel.sequence_parallel and tp == 1:
        errors.append(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1, which is 1: set it to false"
        )
    replica = tp * pp * cp
    if world_size % replica:
        return [
            *errors,
            f"{world_size} processes are not a multiple of the {replica} of one replica (tensor {tp} x pipeline {pp} x context {cp}): "
            f"start a multiple of {replica}, or change the parallel sizes",
        ]
    dp, micro = world_size // replica, training.micro_batch_size
    if training.global_batch_size % (micro * dp):
        errors.append(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of training.micro_batch_size={micro} x {dp} data "
            f"parallel ranks ({world_size} processes / tensor {tp} / pipeline {pp} / context {cp}): change one of them"
        )
    return errors


FP8_FORMATS = ("e4m3", "hybrid")
FP8_RULES: tuple[tuple[str, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]], ...] = (
    # recipe, from compute capability, below it, from CUDA, from Transformer Engine (as Megatron calls it)
    ("delayed", (8, 9), (9, 0), (12, 1), (1, 0)),
    ("delayed", (9, 0), (99, 0), (11, 8), (1, 0)),
    ("tensorwise", (8, 9), (9, 0), (12, 1), (2, 2)),
    ("tensorwise", (9, 0), (99, 0), (11, 8), (2, 2)),
    ("blockwise", (9, 0), (99, 0), (12, 9), (2, 3)),
    ("mxfp8", (10, 0), (12, 0), (12, 8), (2, 1)),
)


def fp8_recipes(
    *, capability: tuple[int, int] | None, cuda: str | None, transformer_engine: str | None
) -> tuple[str, ...]:
    """Megatron's ``fp8_recipe`` values that can run: none on a CPU, without Transformer Engine or on an A100 (capability 8.0).

    Args:
        capability: CUDA compute capability, None on a CPU.
        cuda: version of CUDA that torch was built with, None for a CPU build.
        transformer_engine: its version, None where it is not installed.
    """
    if capability is None or cuda is None or transformer_engine is None:
        return ()
    toolkit, engine = Version(cuda).release, Version(transformer_engine).release
    return tuple(
        recipe
        for recipe, lowest, below, least_cuda, least_engine in FP8_RULES
        if lowest <= capability < below and toolkit >= least_cuda and engine >= least_engine
    )


def check_precision(config: Config, device: torch.device) -> None:
    """Refuses an FP8 format or a layer spec that cannot run here; Megatron itself would silently ignore the first.

    Raises:
        ConfigError: ``precision.fp8`` is not a format.
        DeviceError: it is not there.
    """
    engine, fp8 = version_of("transformer-engine"), config.precision.fp8
    if config.layer_spec == "transformer_engine" and (engine is None or device.type == "cpu"):
        raise DeviceError(
            "layer_spec=transformer_engine needs a GPU and Transformer Engine installed: set layer_spec: auto or local"
        )
    if fp8 is None:
        return
    if fp8 not in FP8_FORMATS:
        raise ConfigError(f"precision.fp8={fp8!r} is not a format: choose one of {', '.join(FP8_FORMATS)}, or null")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    recipe = config.model.transformer.get("fp8_recipe", "delayed")
    possible = fp8_recipes(capability=capability, cuda=torch.version.cuda, transformer_engine=engine)
    if recipe not in possible:
        place = f"compute capability {capability[0]}.{capability[1]}" if capability else "a CPU"
        raise DeviceError(
            f"precision.fp8={fp8} with fp8_recipe={recipe} cannot run on {place} with CUDA {torch.version.cuda or 'absent'} and "
            f"Transformer Engine {engine or 'absent'}; recipes that can: {', '.join(possible) or 'none'}: set precision.fp8 to null"
        )
    if layer_spec(config, device) != "transformer_engine":
        raise DeviceError(
            f"precision.fp8={fp8} needs Transformer Engine's layers: set layer_spec: transformer_engine, or precision.fp8 to null"
        )


def check_config(config: Config, device: torch.device, *, world_size: int) -> None:
    """Everything about device, layout and batch that can be checked before a process group exists; raises as its parts do."""
    from megatron_spin.hf.files import read_config

    check_precision(config, device)
    check_layout(config, read_config(Path(config.model.hf)), world_size=world_size)


def layer_spec(config: Config, device: torch.device) -> Literal["local", "transformer_engine"]:
    """The layer spec that ``auto`` stands for."""
    if config.layer_spec != "auto":
        return config.layer_spec
    return "transformer_engine" if device.type == "cuda" and version_of("transformer-engine") else "local"


def announce(dims: ParallelDims, config: Config) -> str:
    """One line: device, layout, numbers, kernels and versions."""
    on_gpu = dims.device.type == "cuda"
    device = (
        torch.cuda.get_device_name(dims.device) if on_gpu else f"CPU ({torch.get_num_threads()} threads a rank, gloo)"
    )
    layout = f"tensor {dims.tp_size} x pipeline {dims.pp_size} x data {dims.dp_size}"
    precision = config.precision.dtype + (f" with FP8 {config.precision.fp8}" if config.precision.fp8 else "")
    versions = ", ".join(
        f"{name} {version_of(name) or 'absent'}" for name in ("torch", "megatron-core", "transformer-engine", "apex")
    )
    return f"{device}; {layout}; {precision}; {_kernels(config, dims.device)}; {versions}"


def _kernels(config: Config, device: torch.device) -> str:
    spec = layer_spec(config, device)
    if config.model.provider is not None:
        layers = f"layers of {config.model.provider}"
    elif spec == "transformer_engine":
        layers = "layers, attention and fusions of Transformer Engine"
    else:
        layers = "layers of Megatron's local spec with torch's SDPA attention and RMSNorm, nothing fused"
    if device.type == "cpu":
        hidden = [name for name in ("transformer-engine", "apex") if version_of(name)]
        return f"{layers}; torch's optimizers" + (f" ({' and '.join(hidden)} not used on a CPU)" if hidden else "")
    fused = (
        "Transformer Engine's" if version_of("transformer-engine") else "apex's" if version_of("apex") else "torch's"
    )
    return f"{layers}; {fused} optimizers"


def refuse_wrong_apex() -> None:
    """PyPI's ``apex`` is another project; where it can be imported, Megatron picks norms that are not there and fails far from the cause.

    Raises:
        DeviceError: the ``apex`` that Python finds is not NVIDIA's.
    """
    spec = importlib.util.find_spec("apex")  # looks, and does not run the package
    if spec is None:
        return
    places = list(spec.submodule_search_locations or [])
    if not any((Path(place) / "normalization").is_dir() for place in places):
        raise DeviceError(
            f"the package apex at {places[0] if places else spec.origin} is not NVIDIA's (PyPI's apex is another project): "
            "run `pip uninstall apex`; NVIDIA's is built from its source"
        )
