"""The files of a Hugging Face model directory: its config, and its tensors one at a time. No Megatron."""

import contextlib
import errno
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_spin.errors import CheckpointError
from megatron_spin.hf.assets import check_directory, read_json_object

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The dtypes that a model can have, by their names in the configuration."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_HEADER_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFiles:
    """The tensors of a Hugging Face directory by name, from one ``model.safetensors`` or several files with an index.

    Opening reads every header, so that a truncated or missing file is found before anything is loaded. The bytes of a
    tensor are read on demand.

    Raises:
        CheckpointError: no safetensors, a file that the index names is missing, or a file is corrupted.
    """

    def __init__(self, hf_dir: Path) -> None:
        self.directory = Path(hf_dir)
        self._stack = contextlib.ExitStack()
        self._handles: dict[str, Any] = {}
        self._file_of = self._locate()
        """Tensor name to file name."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._handles.clear()

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header, without reading the tensor."""
        return tuple(self._header(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """Floating point dtype from the header; None if the tensor holds anything else, as in a quantized model."""
        return _HEADER_DTYPES.get(self._header(name).get_dtype())

    def _header(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in the file's own dtype.

        Raises:
            CheckpointError: the file cannot be read, or the tensor is not floating point.
        """
        if self.dtype(name) is None:
            raise CheckpointError(
                f"tensor {name} in {self.directory} is not floating point: "
                "quantized models are not supported, use a full one"
            )
        file = self._file_of[name]
        try:
            return self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"tensor {name} cannot be read from {self.directory / file} ({error}): copy the model again"
            ) from None

    def _locate(self) -> dict[str, str]:
        """Opens all files; maps tensor names to file names."""
        check_directory(self.directory)
        if (self.directory / SINGLE_FILE).is_file():
            return dict.fromkeys(self._open(SINGLE_FILE), SINGLE_FILE)
        index = self.directory / INDEX_FILE
        if not index.is_file():
            raise CheckpointError(
                f"{self.directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}: "
                "save it with transformers' save_pretrained"
            )
        weight_map: dict[str, str] | None = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map: copy the model again")
        present = {file: self._open(file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in present[file]:
                raise CheckpointError(
                    f"tensor {name} is not in {self.directory / file}, where {INDEX_FILE} says it is: "
                    "copy the model again"
                )
        return weight_map

    def _open(self, file: str) -> set[str]:
        """Opens ``file``; the names of its tensors."""
        path = self.directory / file
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, but {INDEX_FILE} names it: copy the model again") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is corrupted or truncated ({error}): copy the model again") from None
        self._handles[file] = handle
        return set(handle.keys())


def write_safetensors(tensors: Iterable[tuple[str, torch.Tensor]], directory: Path, *, max_shard_bytes: int) -> None:
    """Writes ``tensors`` as ``model.safetensors``, or as numbered files with an index beyond ``max_shard_bytes``.

    At most one file's tensors are in memory at a time.

    Raises:
        OSError: the disk is full or not writable, with the system's error number.
    """
    parts: list[Path] = []
    names: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total, size = 0, 0

    def flush() -> None:
        parts.append(directory / f"part-{len(parts)}.safetensors")
        names.append(list(shard))
        _save(shard, parts[-1])
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        parts[0].rename(directory / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        final = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        part.rename(directory / final)
        weight_map |= dict.fromkeys(names[number], final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors gives the system's error number only in its text. The command line needs it to tell a full disk
        # from a defect.
        match = _OS_ERROR.search(str(error))
        raise OSError(int(match[1]) if match else errno.EIO, str(error), str(path)) from None
