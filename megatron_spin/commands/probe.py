"""``tools/probe.py``."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from megatron_spin import cli
from megatron_spin.commands.plan import TOOLS
from megatron_spin.config import Config, has_evaluation, load_config
from megatron_spin.errors import ConfigError
from megatron_spin.spin.objective import objective_class


def main() -> None:
    """Tells beforehand whether self-play has something to learn."""
    parser = cli.config_parser(
        "Tell beforehand whether self-play has something to learn: what sets the model's own answers apart from the "
        "real ones on a few hundred prompts. Generates once, trains a few steps, and measures on held-out prompts, "
        "through tools/spin.sh in a run directory of its own; a probe that was stopped continues. Writes probe.json "
        "there."
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=300,
        metavar="N",
        help="prompts to generate on and train on (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=10,
        metavar="N",
        help="optimizer steps before the held-out pairs are judged (default: %(default)s)",
    )
    arguments = cli.parse(parser)
    for name in ("prompts", "steps"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be greater than 0")
    config = load_config(Path(arguments.config), arguments.overrides)
    if not objective_class(config).generates:
        raise ConfigError(f"training.objective={config.training.objective}: a probe is for self-play; set it to spin")
    root = arguments.run_dir or Path("runs") / f"{config.name}-probe"
    driver = [str(TOOLS / "spin.sh"), arguments.config, "--run-dir", str(root), "--until", "evaluate:0"]
    overrides = [*arguments.overrides, *_settings(config, prompts=arguments.prompts, steps=arguments.steps)]
    environment = {**os.environ, "PYTHON": sys.executable}
    status = subprocess.run([*driver, *overrides], env=environment, check=False).returncode
    if status:
        sys.exit(status)  # the driver has said why

    from megatron_spin.io import write_json
    from megatron_spin.report.diagnosis import print_diagnosis, read_diagnosis

    result = read_diagnosis(root)
    write_json(root / "probe.json", dataclasses.asdict(result))
    print_diagnosis(result)
    print(f"written to {root / 'probe.json'}")


def _settings(config: Config, *, prompts: int, steps: int) -> list[str]:
    """What a probe changes of the configuration."""
    settings = [
        f"data.num_prompts={prompts}",
        f"evaluation.num_prompts={prompts}",
        "spin.iterations=1",
        f"training.steps={steps}",
        "baselines={}",
    ]
    if not has_evaluation(config):
        settings.append("evaluation.held_out_fraction=0.25")
    return settings
