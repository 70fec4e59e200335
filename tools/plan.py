"""Prints the plan of a run for the driver."""

from megatron_spin import cli
from megatron_spin.commands.plan import main

if __name__ == "__main__":
    cli.run(main)
