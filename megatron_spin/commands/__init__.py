"""The command lines, one module per command with a ``main()``; ``tools/`` and the ``megatron-spin`` script call them.

A module imports only what its arguments need. What the work needs is imported when there is work to do.
"""

COMMANDS = {
    "plan": "print the plan of a run for the driver",
    "prepare": "read, check and tokenize the data",
    "import_hf": "turn a Hugging Face model into a Megatron checkpoint",
    "generate": "let the opponent of an iteration answer every prompt",
    "train": "train one iteration or baseline",
    "export_hf": "turn a Megatron checkpoint into a Hugging Face model",
    "evaluate": "measure a model on held-out prompts",
    "guard": "judge whether an iteration is fit to become the opponent",
    "rotate": "complete an iteration or baseline",
    "probe": "tell beforehand whether self-play has something to learn",
    "report": "show what a run measured",
}
"""Names of the modules, each with what it does."""
