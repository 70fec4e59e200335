"""Hugging Face directory to Megatron checkpoint, alone or under torchrun."""

from megatron_spin import cli
from megatron_spin.commands.import_hf import main

if __name__ == "__main__":
    cli.run(main)
