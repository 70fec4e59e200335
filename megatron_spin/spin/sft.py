"""SFT: the negative log-likelihood of the real answers, per token."""

import dataclasses
from typing import ClassVar

from megatron_spin.spin.objective import AnswerLogps, Objective, Outcome


@dataclasses.dataclass(frozen=True)
class Sft(Objective):
    """Mean negative log-likelihood over all response tokens of the global batch: long answers count more."""

    label: ClassVar[str] = "SFT"
    task: ClassVar[str] = "fine-tune on the answers"
    start_label: ClassVar[str] = "untrained"
    answers: ClassVar[tuple[str, ...]] = ("real",)
    needs_reference: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    def __call__(self, logps: AnswerLogps) -> Outcome:
        return Outcome(-logps.policy[:, 0], count=logps.lengths[:, 0].int())
