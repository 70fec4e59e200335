"""Measures an iteration, a baseline or the model as it came (--baseline sft) on held-out prompts; writes eval.json and samples.jsonl."""

import os
import time

from megatron_spin import cli
from megatron_spin.errors import ConfigError
from megatron_spin.run.directory import RunDir


def main() -> None:
    parser = cli.config_parser(__doc__ or "")
    cli.add_target(parser)
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)
    run_dir = RunDir(root)
    run_dir.open(config)
    target = run_dir.target(iteration=arguments.iteration, baseline=arguments.baseline)
    phase = f"evaluate:{target.label}"
    if target.baseline not in (None, "sft", *config.baselines):
        raise ConfigError(
            f"--baseline {target.baseline} is not in the config: it has sft, {', '.join(config.baselines)}"
        )
    if run_dir.is_done(phase):
        print(f"{phase} is already done")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from megatron_spin.evaluation.answers import EvaluatedModel
    from megatron_spin.phases.evaluate import evaluate

    started = time.monotonic()
    result = evaluate(config, run_dir, EvaluatedModel.of(config, target))
    for key in (
        "nll_per_token",
        "exact_match_sampled",
        "exact_match_greedy",
        "truncated_fraction",
        "opponent_accuracy",
    ):
        value = result.measure(key).value
        if value is not None:
            print(f"  {key:<20} {value:.4f}")
    run_dir.mark_done(phase, seconds=time.monotonic() - started, model=result.model, num_prompts=result.num_prompts)


if __name__ == "__main__":
    cli.run(main)
