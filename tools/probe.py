"""Tells beforehand whether self-play has something to learn."""

from megatron_spin import cli
from megatron_spin.commands.probe import main

if __name__ == "__main__":
    cli.run(main)
