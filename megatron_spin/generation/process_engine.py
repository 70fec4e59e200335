"""The parent's side of an engine in a process of its own, on devices of its own. Imports neither torch nor vLLM."""

import collections
import contextlib
import dataclasses
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
from megatron_spin.generation.worker import KINDS
from megatron_spin.machine import VISIBLE

WORKERS = {"vllm": "megatron_spin.generation.vllm_worker", "hf": "megatron_spin.generation.hf_worker"}
"""Module that the process of each engine runs."""

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


class ProcessSession(contextlib.AbstractContextManager["ProcessSession"]):
    """A process that starts on entry and ends on exit; see :class:`megatron_spin.generation.engine.Session`."""

    def __init__(self, settings: EngineSettings) -> None:
        reserved = settings.vllm.keys() & RESERVED.keys() if settings.engine == "vllm" else set()
        for key in reserved:
            remedy = f"set {RESERVED[key]} instead" if RESERVED[key] else "remove it"
            raise ConfigError(f"generation.vllm.{key}={settings.vllm[key]!r} is decided by Megatron-SPIN: {remedy}")
        if not (settings.hf_dir / "config.json").is_file():
            raise CheckpointError(f"{settings.hf_dir} holds no config.json: give the directory of a Hugging Face model")
        self._settings = settings
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None
        self._is_killed = False
        self._name = {"vllm": "vLLM", "hf": "generation"}[settings.engine]
        self._remedy = ", or try generation.engine=hf" if settings.engine == "vllm" else ""

    def __enter__(self) -> "ProcessSession":
        settings = self._settings
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(
                open(settings.log, "w+b") if settings.log else tempfile.TemporaryFile("w+b")
            )
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", WORKERS[settings.engine]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=_environment(settings),
                text=True,
                start_new_session=True,  # its own process group, so that it can be killed with its children
            )
            stack.callback(self._end)
            if self._is_killed:  # while it was started
                self.kill()
            self._send({**dataclasses.asdict(settings), "hf_dir": str(settings.hf_dir.resolve()), "log": None})
            self._receive()  # {"ready": true}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kill(self) -> None:
        """Ends the process at once, from any thread; whoever waits for it gets a DeviceError."""
        self._is_killed = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

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
            for index, token_ids, reason in message.get("finished", []):
                answers[index] = self._completion(index, token_ids, reason)
            if progress is not None and "progress" in message:
                progress(*message["progress"])
        missing = answers.count(None)
        if missing:
            raise DeviceError(
                f"{self._name} left {missing} of {len(prompts)} prompts unanswered: {self._log_end()}; "
                f"run again{self._remedy}"
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
            f"{self._name} ended answer {index} by {reason!r} with {len(token_ids)} tokens and the end token at "
            f"{ends}, where it must be the last of a stopped answer and absent from a cut one: run again{self._remedy}"
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
            if message["kind"] in KINDS:
                raise KINDS[message["kind"]](message["error"])
            remedy = "lower generation.batch_size if memory ran out"
            if self._settings.engine == "vllm":
                remedy = "set generation.vllm arguments that suit this machine, or generation.engine=hf"
            raise DeviceError(f"{self._name} failed: {message['error']}; its log ends: {self._log_end()}; {remedy}")
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
            f"the {self._name} process{self._place()} {how}{hint}; its log ends: {self._log_end()}; "
            f"run again to continue{self._remedy}"
        )

    def _place(self) -> str:
        gpus = ",".join(self._settings.gpus)
        return f" on GPU {gpus}" if gpus else ""

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
        self._process = None  # its number may soon be another process's, which kill() must not reach


def _environment(settings: EngineSettings) -> dict[str, str]:
    """The process's environment: the package, its own GPUs or its share of the cores."""
    environment = dict(os.environ)
    package = str(Path(megatron_spin.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    if settings.gpus:
        environment[VISIBLE] = ",".join(settings.gpus)
    elif settings.processes > 1:
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // settings.processes)))
        # vLLM's processes would all bind themselves to the same cores.
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return environment
