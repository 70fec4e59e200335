"""The process that runs the ``hf`` engine where several run at a time; see :mod:`megatron_spin.generation.worker`."""

from pathlib import Path

from megatron_spin.generation.engine import EngineSettings
from megatron_spin.generation.hf_engine import HfSession
from megatron_spin.generation.worker import Answer, Message, Send, serve


def start(settings: Message) -> Answer:
    """Loads the model; ``settings`` are those of :class:`EngineSettings`."""
    session = HfSession(EngineSettings(**{**settings, "hf_dir": Path(settings["hf_dir"])}))

    def answer(request: Message, send: Send) -> None:
        completions = session.generate(
            request["prompts"],
            max_new_tokens=request["max_tokens"],
            temperature=request["temperature"],
            top_p=request["top_p"],
            seed=request["seed"],
            progress=lambda prompts, tokens: send({"progress": [prompts, tokens]}),
        )
        finished = [[index, given.token_ids, given.finish_reason] for index, given in enumerate(completions)]
        send({"finished": finished})

    return answer


if __name__ == "__main__":
    serve(start)
