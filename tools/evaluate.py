"""Measures a model on held-out prompts."""

from megatron_spin import cli
from megatron_spin.commands.evaluate import main

if __name__ == "__main__":
    cli.run(main)
