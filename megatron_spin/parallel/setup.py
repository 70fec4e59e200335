"""Device and process groups of this process."""

import datetime
import os
from typing import Literal

import torch

from megatron_spin.config import ParallelConfig
from megatron_spin.errors import DeviceError
from megatron_spin.hf import model as hf_model
from megatron_spin.parallel import cpu_device
from megatron_spin.parallel.check import check_version
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.kernels import refuse_wrong_apex
from megatron_spin.parallel.quiet import quiet_megatron
from megatron_spin.processes import Ranks

DETERMINISTIC = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention: no atomic additions backward
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS: one workspace per stream
    "NCCL_ALGO": "Ring",  # NCCL: sums in the same order every time
}
"""Environment that Megatron-LM asks for in its deterministic mode, read when CUDA, cuBLAS and NCCL start."""


def choose_device(device: Literal["auto", "cpu", "cuda"], *, deterministic: bool = False) -> torch.device:
    """The device of this process, made ready for Megatron; call it before anything imports ``megatron.core``.

    Args:
        deterministic: on a GPU, only kernels whose results do not depend on the order in which threads run.

    Raises:
        DeviceError: ``cuda`` was asked for and is not there, or there are fewer GPUs than local ranks.
    """
    check_version()
    quiet_megatron()
    # Megatron's overlap of tensor parallel communication needs one hardware queue; CUDA reads this when it starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    chosen = hf_model.choose_device(device)
    if chosen.type == "cpu":
        cpu_device.install()
        return chosen
    refuse_wrong_apex()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise DeviceError(
            f"local rank {local_rank} has no GPU of its own, this machine has {count}: start one process per GPU"
        )
    torch.cuda.set_device(local_rank)
    compute_in_fp32()
    if deterministic:
        compute_deterministically()
    return torch.device("cuda", local_rank)


def compute_deterministically() -> None:
    """Makes this process take deterministic kernels only, before CUDA starts."""
    os.environ.update(DETERMINISTIC)
    torch.use_deterministic_algorithms(True)
    # It is for finding defects, and writes all memory once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compute_in_fp32() -> None:
    """Makes torch multiply fp32 matrices in fp32, whatever the environment or an imported package set.

    TF32, which torch can use on a GPU, keeps 10 bits of the mantissa.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def join(parallel: ParallelConfig, device: torch.device) -> Ranks:
    """Joins the process group of torchrun's environment (without it, a group of one), unless that has been done."""
    if not torch.distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        timeout = datetime.timedelta(minutes=parallel.timeout)
        if "WORLD_SIZE" in os.environ:
            torch.distributed.init_process_group(backend, timeout=timeout)
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, timeout=timeout, rank=0, world_size=1, store=store)
    return Ranks(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())


def initialize(parallel: ParallelConfig, device: torch.device, *, seed: int = 0) -> ParallelDims:
    """Joins the process group (:func:`join`) and lays out Megatron's groups in it.

    May be called again in the same process with another layout. ``seed`` is for Megatron's generators, which only
    initialization uses; there is no dropout.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    ranks = join(parallel, device)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with cpu_device.megatron_region():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            distributed_timeout_minutes=parallel.timeout,  # each group has its own
        )
        model_parallel_cuda_manual_seed(seed + 1)  # positive, as Megatron-LM asks of its own seed
    return ParallelDims(
        device=device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
