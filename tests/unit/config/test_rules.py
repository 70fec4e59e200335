"""Values outside their ranges, and values that contradict each other."""

from typing import Any

import pytest

from megatron_spin.errors import ConfigError
from tests.support.configs import build


def refused(**sections: Any) -> str:
    """The one line that refuses ``sections``."""
    with pytest.raises(ConfigError) as caught:
        build(**sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"learning_rate": [1e-4, 0]}}, "training.learning_rate=0.0 must be greater than 0"),
        ({"spin": {"beta": -0.1}}, "spin.beta=-0.1 must be greater than 0"),
        ({"generation": {"top_p": 1.1}}, "generation.top_p=1.1 must lie between 0 and 1, 0 excluded"),
        ({"spin": {"sft_weight": [0, -1]}}, "spin.sft_weight=-1.0 must not be negative"),
        ({"generation": {"temperature": 0}}, "generation.temperature=0.0 must be greater than 0"),
        ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens=0"),
        ({"training": {"warmup_fraction": 1.5}}, "training.warmup_fraction=1.5 must lie between 0 and 1"),
        ({"evaluation": {"held_out_fraction": 1.0}}, "evaluation.held_out_fraction=1.0"),
        ({"training": {"global_batch_size": 10, "micro_batch_size": 4}}, "global_batch_size=10 is not a multiple of"),
        ({"training": {"global_batch_size": [8, 10], "micro_batch_size": 4}}, "global_batch_size=10 is not a multiple"),
        ({"data": {"path": "d", "max_length": 8, "max_prompt_length": 8}}, "data.max_prompt_length=8 leaves no room"),
        (
            {"training": {"objective": "ppo"}},
            "training.objective='ppo' is neither one of spin, dpo, sft nor package.module:Class",
        ),
        ({"parallel": {"context_parallel_size": 2}}, "parallel.context_parallel_size=2"),
        ({"parallel": {"sequence_parallel": True}}, "needs parallel.tensor_model_parallel_size > 1"),
        ({"parallel": {"tensor_model_parallel_size": 3, "nproc_per_node": 2}}, "parallel.nproc_per_node=2"),
        ({"evaluation": {"answer_pattern": "("}}, "is not a regular expression"),
        ({"evaluation": {"answer_pattern": "answer"}}, "has 0 groups: it needs exactly one"),
        ({"evaluation": {"patterns": {"bad": "["}}}, "evaluation pattern bad='['"),
        ({"baselines": {"sft": {}}}, "baselines.sft"),
        ({"baselines": {"a/b": {}}}, "baselines.a/b"),
    ],
)
def test_values_out_of_range(sections: dict[str, Any], message: str) -> None:
    assert message in refused(**sections)
