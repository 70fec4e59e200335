"""The code for CUDA, on fake tensors: no tensor is left on the CPU, and the host reads the GPU no more than it must.

:mod:`tests.support.fake_cuda` says what fake tensors do not show.
"""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from packaging.version import Version

from megatron_spin.parallel.check import check_version
from tests.support.fake_training import FakeLayout, FakeStep, take_steps
from tests.support.world import RankError

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one": FakeLayout(SMALL),
    "tp2_sp": FakeLayout(SMALL, 2, 1, {**TP2, "sequence_parallel": True}),
    "pp2_first": FakeLayout(SMALL, 2, 0, PP2),
    "pp2_last": FakeLayout(SMALL, 2, 1, PP2),
    "tp2_pp2_dp2": FakeLayout(SMALL, 8, 7, {**TP2, **PP2}),
    "bf16_rmsprop": FakeLayout(SMALL, optimizer="rmsprop", dtype="bf16"),
}
NODES_64 = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "sequence_parallel": True}

SCORING_READS = {
    # The scores of a global batch, at once.
    "megatron_spin/training/scoring.py:score": 1,
}
STEP_READS = {
    # The means of everything that a step reports, at once.
    "megatron_spin/training/trainer.py:Trainer._means": 1,
    # The norm decides whether gradients are clipped.
    "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": 1,
}
if Version(check_version()) < Version("0.18"):
    # Whether any prompt counts in the global batch: gradients are divided by their number. Later versions need not ask.
    STEP_READS["megatron/core/distributed/finalize_model_grads.py:finalize_model_grads"] = 1
# Microbatches differ in length: a stage reads the shape of what a neighbour is about to send.
PIPELINE_READS = "megatron/core/pipeline_parallel/p2p_communication.py:P2PCommunicator._communicate_shapes"

Run: TypeAlias = Callable[[FakeLayout], FakeStep]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Takes the steps of a layout in one process for all tests, which stays a fake CUDA one."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        yield lambda layout: process.submit(take_steps, tmp_path_factory.mktemp("model"), layout).result(timeout=300)


@pytest.fixture(scope="module", params=LAYOUTS)
def taken(request: pytest.FixtureRequest, run: Run) -> tuple[FakeLayout, FakeStep]:
    layout = LAYOUTS[request.param]
    return layout, run(layout)


def test_everything_is_on_the_gpu(taken: tuple[FakeLayout, FakeStep]) -> None:
    assert taken[1].devices == {"cuda:0"}


def test_a_rank_holds_its_share(taken: tuple[FakeLayout, FakeStep]) -> None:
    assert_share(*taken)


def test_norms_are_marked_under_sequence_parallelism(taken: tuple[FakeLayout, FakeStep]) -> None:
    layout, step = taken
    norms = 2 * SMALL["num_hidden_layers"] + 1
    assert step.sequence_parallel == (norms if layout.parallel.get("sequence_parallel") else 0)


def test_the_host_reads_the_gpu_no_more_than_it_must(taken: tuple[FakeLayout, FakeStep]) -> None:
    layout, step = taken
    # Of two microbatches, a stage gets activations if it is not the first, and gradients if it is not the last.
    from_before, from_behind = 2 * (layout.stage > 0), 2 * (layout.stage < layout.stages - 1)
    assert step.scoring_reads == SCORING_READS | _pipeline(from_before)
    assert step.step_reads == STEP_READS | _pipeline(from_before + from_behind)


@pytest.mark.parametrize("tensor", ["input_ids", "response_mask", "reference"])
def test_a_tensor_left_on_the_cpu_is_caught(run: Run, tensor: Any) -> None:
    with pytest.raises(RankError, match="Expected all tensors to be on the same device"):
        run(FakeLayout(SMALL, fault=tensor))


def test_another_read_of_the_gpu_is_caught(run: Run) -> None:
    reads = run(FakeLayout(SMALL, fault="read")).step_reads
    assert sum(reads.values()) == sum(STEP_READS.values()) + 2, reads  # one per microbatch


def test_70b_on_64_nodes(run: Run) -> None:
    """TP8 x PP4 x DP16 on 512 ranks: one rank of each stage."""
    steps = []
    for rank in (0, 130, 300, 511):
        layout = FakeLayout(LLAMA_70B, 512, rank, NODES_64, dtype="bf16")
        steps.append(run(layout))
        assert_share(layout, steps[-1])
        assert steps[-1].devices == {"cuda:0"}
    assert sum(step.hf_elements for step in steps) == 70_553_706_496


def assert_share(layout: FakeLayout, step: FakeStep) -> None:
    """Tensor parallel ranks hold their stage's parameters, and data parallel ranks equal parts of the main weights."""
    assert step.sharded * layout.tp_size + step.replicated == step.hf_elements
    held = step.sharded + step.replicated
    assert step.optimizer_elements == pytest.approx(held / layout.dp_size, rel=0.05)


def _pipeline(reads: int) -> dict[str, int]:
    return {PIPELINE_READS: reads} if reads else {}
