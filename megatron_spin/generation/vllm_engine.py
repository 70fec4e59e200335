"""Generation with vLLM in its own process, :mod:`megatron_spin.generation.vllm_worker`.

Imports neither torch nor vLLM.
"""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import megatron_spin
from megatron_spin.errors import CheckpointError, ConfigError, DeviceError
from megatron_spin.generation.engine import Completion, EngineSettings, Progress

RESERVED = {
    "model": "model.hf",
    "dtype": "precision.export",
    "max_model_len": "data.max_length",
    "seed": "generation.seed",
    "skip_tokenizer_init": None,
    "worker_extension_cls": None,
    "generation_config": None,
}
"""vLLM engine arguments that ``generation.vllm`` may not set, and the key of the configuration that does."""
LOG_LINES = 5
"""Lines of the worker's log that an error quotes."""
SECONDS_TO_END = 10
"""How long the worker may take to end by itself."""


class VllmSession(contextlib.AbstractContextManager["VllmSession"]):
    """A vLLM process that starts on entry and ends on exit; see :class:`megatron_spin.generation.engine.Session`."""

    def __init__(self, settings: EngineSettings) -> None:
        for key in settings.vllm.keys() & RESERVED.keys():
            remedy = f"set {RESERVED[key]} instead" if RESERVED[key] else "remove it"
            raise ConfigError(f"generation.vllm.{key}={settings.vllm[key]!r} is decided by Megatron-SPIN: {remedy}")
        if not (settings.hf_dir / "config.json").is_file():
            raise CheckpointError(f"{settings.hf_dir} holds no config.json: give the directory of a Hugging Face model")
        self._settings = settings
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> "VllmSession":
        settings = self._settings
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(
                open(settings.log, "w+b") if settings.log else tempfile.TemporaryFile("w+b")
            )
            package = str(Path(megatron_spin.__file__).parents[1])
            path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "megatron_spin.generation.vllm_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "PYTHONPATH": path},
                text=True,
                start_new_session=True,  # its own process group, so that it can be killed with its children
            )
            stack.callback(self._end)
            self._send(
                {
                    "hf_dir": str(settings.hf_dir.resolve()),
                    "dtype": settings.dtype,
                    "end_token_id": settings.end_token_id,
                    "max_length": settings.max_length,
                    "device": settings.device,
                    "vllm": settings.vllm,
                }
            )
            self._receive()  # {"ready": true}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        top_p: float,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """See :meth:`megatron_spin.generation.engine.Session.generate`."""
        if not prompts:
            return []
        self._send(
            {
                "prompts": [list(prompt) for prompt in prompts],
                "max_tokens": list(max_new_tokens),
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed,
            }
        )
        answers: list[Completion | None] = [None] * len(prompts)
        while "done" not in (message := self._receive()):
            for index, token_ids, reason in message["finished"]:
                answers[index] = self._completion(index, token_ids, reason)
            if progress is not None:
                num_tokens = sum(len(token_ids) for _, token_ids, _ in message["finished"])
                progress(len(message["finished"]), num_tokens)
        missing = answers.count(None)
        if missing:
            raise DeviceError(
                f"vLLM left {missing} of {len(prompts)} prompts unanswered: {self._log_end()}; try generation.engine=hf"
            )
        return [answer for answer in answers if answer is not None]

    def _completion(self, index: int, token_ids: list[int], reason: str) -> Completion:
        end = self._settings.end_token_id
        ends = [position for position, token in enumerate(token_ids) if token == end]
        if reason == "stop" and ends == [len(token_ids) - 1]:
            return Completion(token_ids, "stop")
        if reason == "length" and token_ids and not ends:
            return Completion(token_ids, "length")
        raise DeviceError(
            f"vLLM ended answer {index} by {reason!r} with {len(token_ids)} tokens and the end token at {ends}, where "
            "it must be the last of a stopped answer and absent from a cut one: try generation.engine=hf"
        )

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message, separators=(",", ":")) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            if message["kind"] == "config":
                raise ConfigError(message["error"])
            if message["kind"] == "device":
                raise DeviceError(message["error"])
            remedy = "set generation.vllm arguments that suit this machine, or generation.engine=hf"
            raise DeviceError(f"vLLM failed: {message['error']}; its log ends: {self._log_end()}; {remedy}")
        return message

    def _death(self) -> DeviceError:
        assert self._process is not None
        try:
            status = self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            status = 0
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        hint = "; it may have run out of memory" if status == -signal.SIGKILL else ""
        return DeviceError(
            f"the vLLM process {how}{hint}; its log ends: {self._log_end()}; "
            "run again to continue, or try generation.engine=hf"
        )

    def _log_end(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        lines = collections.deque((line.decode(errors="replace").strip() for line in self._log), maxlen=50)
        return " | ".join([line for line in lines if line][-LOG_LINES:]) or "(empty)"

    def _end(self) -> None:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the processes that vLLM started, too
        process.wait()
        process.stdout.close()
