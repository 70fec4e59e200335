"""What a rank on fake CUDA tensors runs: build, load, score and two optimizer steps of the product, without values."""

import dataclasses
import functools
import json
import re
import traceback
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_spin.config import Config
from megatron_spin.data.batcher import Batcher, Example, Microbatch
from megatron_spin.hf.files import INDEX_FILE, TensorFiles
from megatron_spin.spin.objective import AnswerLogps, Objective, Outcome, build_objective
from tests.support import fake_cuda
from tests.support.ranks import tiny_config
from tests.support.world import RankError

PROMPT, ANSWER = 9, 8
"""Tokens of each prompt and answer. All have one length, so that all microbatches have one shape."""
MICRO_BATCH = 2


@dataclasses.dataclass(frozen=True)
class FakeLayout:
    """A Llama, a layout and one of its ranks."""

    model: dict[str, Any]
    """Arguments of transformers' LlamaConfig."""
    world_size: int = 1
    rank: int = 0
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The section ``parallel``."""
    optimizer: str = "adam"
    dtype: str = "fp32"
    fault: Literal["input_ids", "response_mask", "reference", "read", None] = None
    """What is wrong: this tensor of each microbatch is left on the CPU, or the objective reads its loss."""

    @property
    def stages(self) -> int:
        return int(self.parallel.get("pipeline_model_parallel_size", 1))

    @property
    def stage(self) -> int:
        return self.rank // (self.world_size // self.stages)

    @property
    def tp_size(self) -> int:
        return int(self.parallel.get("tensor_model_parallel_size", 1))

    @property
    def dp_size(self) -> int:
        return self.world_size // self.stages // self.tp_size


@dataclasses.dataclass(frozen=True)
class FakeStep:
    """What a rank shows."""

    hf_elements: int
    """Elements of the Hugging Face tensors that this pipeline stage reads."""
    sharded: int
    """Elements of this rank's parameters of which tensor parallel ranks hold different parts."""
    replicated: int
    """Elements of the parameters that they hold alike."""
    sequence_parallel: int
    """How many parameters are marked: their gradients are summed over tensor parallel ranks."""
    devices: set[str]
    """Of parameters, gradients and the optimizer's main weights."""
    optimizer_elements: int
    """Elements of the main weights that this rank's optimizer holds."""
    scoring_reads: dict[str, int]
    """Reads of the GPU by the host while one global batch is scored: function to number."""
    step_reads: dict[str, int]
    """The same for one optimizer step."""


def take_steps(directory: Path, layout: FakeLayout) -> FakeStep:
    """Builds and loads the policy of ``layout`` from files in ``directory``, scores one global batch and trains on it
    twice.

    For a process of its own, which stays a fake CUDA one.

    Raises:
        RankError: the rank raised, for example because an operation has tensors on ``cuda:0`` and on the CPU.
    """
    _install()
    hf_elements = write_stage(directory, layout)
    config = tiny_config(
        directory,
        device="cuda",
        layer_spec="local",
        parallel=layout.parallel,
        optimizer={"optimizer": layout.optimizer, "clip_grad": 1.0},
        precision={"dtype": layout.dtype},
    )
    try:
        with fake_cuda.rank_of(layout.world_size, layout.rank) as reads:
            return _take_steps(config, layout, reads, hf_elements)
    except Exception:
        raise RankError(traceback.format_exc()) from None  # torch's own errors cannot be sent to another process


@functools.cache
def _install() -> None:
    fake_cuda.install()
    TensorFiles.read = _read_fake  # type: ignore[method-assign, assignment]


def _read_fake(files: TensorFiles, name: str) -> torch.Tensor:
    return torch.empty(files.shape(name), dtype=files.dtype(name))


def write_stage(directory: Path, layout: FakeLayout) -> int:
    """Writes config.json of the whole model, and what the pipeline stage of ``layout`` reads of its weights; the number
    of their elements.

    Each tensor is a file of its own, a header before a hole, so that 70B parameters take no disk.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    hf_config = LlamaConfig(**layout.model)
    hf_config.save_pretrained(directory)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(hf_config).state_dict()
    if hf_config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    files: dict[str, str] = {}
    elements = 0
    for name, tensor in tensors.items():
        if not _on_stage(name, layout):
            continue
        files[name] = f"{name}.safetensors"
        elements += tensor.numel()
        size = 2 * tensor.numel()
        header = json.dumps({name: {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [0, size]}}).encode()
        with open(directory / files[name], "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    return elements


def _on_stage(name: str, layout: FakeLayout) -> bool:
    """Whether the pipeline stage of ``layout`` reads the tensor ``name``."""
    is_last = layout.stage == layout.stages - 1
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) // (layout.model["num_hidden_layers"] // layout.stages) == layout.stage
    if name == "model.embed_tokens.weight":
        return layout.stage == 0 or (is_last and bool(layout.model["tie_word_embeddings"]))
    return is_last


def _take_steps(config: Config, layout: FakeLayout, reads: fake_cuda.HostReads, hf_elements: int) -> FakeStep:
    from megatron_spin.conversion.load import load_hf
    from megatron_spin.data.sampler import BatchSampler
    from megatron_spin.parallel.setup import initialize
    from megatron_spin.training.assembly import build_policy
    from megatron_spin.training.optimizer_state import inner_optimizers
    from megatron_spin.training.schedule import StepPlan

    dims = initialize(config.parallel, fake_cuda.DEVICE)
    batch_size = 2 * MICRO_BATCH * dims.dp_size
    examples = [Example([1] * PROMPT, ([2] * ANSWER, [3] * ANSWER))] * batch_size
    policy = build_policy(config, examples, dims=dims, peak=1e-3, global_batch_size=batch_size)
    load_hf(policy.model, Path(config.model.hf), dims)
    policy.optimizer.reload_model_params()
    if layout.fault not in (None, "read"):
        policy = dataclasses.replace(policy, batcher=_LeavesOnCpu(**vars(policy.batcher), name=layout.fault))
    objective = build_objective(config, 0)
    if layout.fault == "read":
        objective = _Reads(objective)
    with unset_fake_temporarily():  # the trainer tries its objective and looks at the values
        trainer = policy.trainer(
            objective,
            np.zeros((batch_size, 2), dtype=np.float32),
            BatchSampler(batch_size, batch_size, 0),
            StepPlan(total=2, peak=1e-3, decay="constant", warmup_fraction=0.0),
        )

    [batch, *_] = policy.batcher.microbatches(np.arange(batch_size))
    with fake_cuda.neighbours(policy.model, batch.shape):
        reads.count.clear()
        policy.score()
        scoring_reads = dict(reads.count)
        trainer.step(0)  # allocates the optimizer's state
        reads.count.clear()
        trainer.step(1)

    parameters = list(policy.model[0].parameters())
    gradients = [parameter.main_grad for parameter in parameters]
    main_weights = []
    for inner in inner_optimizers(policy.optimizer):
        for group in inner.param_groups:
            main_weights += group["params"]
    sharded = [parameter for parameter in parameters if parameter.tensor_model_parallel]
    replicated = [parameter for parameter in parameters if not parameter.tensor_model_parallel]
    return FakeStep(
        hf_elements=hf_elements,
        sharded=_elements(sharded),
        replicated=_elements(replicated),
        sequence_parallel=sum(bool(getattr(parameter, "sequence_parallel", False)) for parameter in parameters),
        devices={str(tensor.device) for tensor in [*parameters, *gradients, *main_weights]},
        optimizer_elements=_elements(main_weights),
        scoring_reads=scoring_reads,
        step_reads=dict(reads.count),
    )


def _elements(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


@dataclasses.dataclass(frozen=True)
class _LeavesOnCpu(Batcher):
    """A batcher that forgets to move the field ``name`` of a microbatch."""

    name: str = ""

    def microbatches(self, indices: np.ndarray, reference: np.ndarray | None = None) -> list[Microbatch]:
        batches = []
        for batch in super().microbatches(indices, reference):
            forgotten = getattr(batch, self.name)
            batches.append(batch if forgotten is None else dataclasses.replace(batch, **{self.name: forgotten.cpu()}))
        return batches


class _Reads(Objective):
    """An objective that looks at its loss."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, logps: AnswerLogps) -> Outcome:
        outcome = self._objective(logps)
        outcome.loss.sum().item()
        return outcome
