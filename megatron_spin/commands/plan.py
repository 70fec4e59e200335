"""``tools/plan.py``."""

from collections.abc import Sequence
from pathlib import Path

from megatron_spin import cli
from megatron_spin.run.devices import num_ranks
from megatron_spin.run.directory import RunDir
from megatron_spin.run.plan import CommandLines, Plan, PlannedPhase, as_text
from megatron_spin.run.preflight import check

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def main() -> None:
    """Prints the plan of a run."""
    parser = cli.config_parser("Print the plan of a run as shell assignments for the driver, one line per phase.")
    parser.add_argument("--until", metavar="PHASE:T", help="leave out what comes after this phase, for example train:0")
    parser.add_argument(
        "--check", action="store_true", help="first check everything that can be checked before anything is started"
    )
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)
    plan = Plan(config, RunDir(root))
    phases = plan.phases(arguments.until)
    if arguments.check:
        check_all(plan, phases)
    commands = CommandLines(
        config=config,
        run_dir=plan.run_dir,
        config_path=arguments.config,
        overrides=arguments.overrides,
        tools=TOOLS,
    )
    print("\n".join(as_text(phases, commands)))


def check_all(plan: Plan, phases: Sequence[PlannedPhase]) -> None:
    """Checks what those of ``phases`` that are still to do will need, training included.

    Raises:
        SpinError: the first thing that is missing or cannot be, in one line.
    """
    check(plan, phases)
    if any(phase.kind == "train" and phase.status == "todo" for phase in phases):
        from megatron_spin.training.preflight import check_training

        check_training(plan.config, world_size=num_ranks(plan.config))
