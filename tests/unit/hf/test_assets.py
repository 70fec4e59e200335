"""Config, tokenizer and template files are copied byte for byte; only the dtype in config.json changes."""

from pathlib import Path

from megatron_spin.hf.assets import copy_assets, set_dtype, stored_dtype, tokenizer_files


def test_assets_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "additional_chat_templates").mkdir(parents=True)
    kept = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ]
    left = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md", "training_args.bin"]
    for name in kept + left:
        (source / name).write_bytes(name.encode() + b"\xff")
    assert copy_assets(source, copy) == sorted(kept)
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()) == sorted(kept)
    assert all((copy / name).read_bytes() == name.encode() + b"\xff" for name in kept)


def test_set_dtype_changes_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"z": [1, 1e-05], "torch_dtype": "float32", "name": "é"}')
    set_dtype(tmp_path, "fp32")
    assert path.read_text() == '{"z": [1, 1e-05], "torch_dtype": "float32", "name": "é"}'
    set_dtype(tmp_path, "bf16")
    assert path.read_text() == '{\n  "z": [\n    1,\n    1e-05\n  ],\n  "torch_dtype": "bfloat16",\n  "name": "é"\n}\n'
    assert (stored_dtype({"dtype": "bfloat16"}), stored_dtype({"torch_dtype": "float16"}), stored_dtype({})) == (
        "bf16",
        "fp32",
        "fp32",
    )


def test_every_file_that_defines_the_tokenizer_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = ["added_tokens.json", "merges.txt", "tekken.json", "tokenizer.json", "tokenizer.model.v3", "vocab.bpe"]
    for name in [*names, "config.json", "README.md"]:
        (source / name).write_text("{}")
    assert [path.name for path in tokenizer_files(source)] == names
    assert copy_assets(source, tmp_path / "copy") == sorted([*names, "config.json"])
