"""The example configurations hold what their comments say."""

from megatron_spin.config import load_config
from tests.support.runs import REPOSITORY


def test_the_papers_run_drops_long_answers_and_gives_sft_a_rate_of_its_own() -> None:
    config = load_config(REPOSITORY / "examples/configs/zephyr-7b.yaml", [])
    assert config.data.max_answer_length == config.generation.max_new_tokens
    rates = [baseline.learning_rate for baseline in config.baselines.values()]
    assert len(rates) == 2 and all(rate is not None and 1e-5 <= rate <= 2e-5 for rate in rates)
    assert config.training.global_batch_size == 64
    epoch = config.baselines["sft_epoch"].steps
    assert config.data.num_prompts is not None
    assert isinstance(epoch, int) and epoch == config.data.num_prompts // 64


def test_the_real_model_runs_on_one_process_of_many_gpus() -> None:
    config = load_config(REPOSITORY / "examples/smollm2/spin.yaml", ["parallel.nproc_per_node=1"])
    training = config.training
    assert isinstance(training.global_batch_size, int) and isinstance(training.micro_batch_size, int)
    assert training.global_batch_size % (8 * training.micro_batch_size), "eight GPUs cannot share a step"
    script = (REPOSITORY / "examples/smollm2/run.sh").read_text()
    assert "settings+=('parallel.nproc_per_node=1')" in script
