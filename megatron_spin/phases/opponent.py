"""The opponent of an iteration: where it is, which model it is, and that it is what was exported."""

import dataclasses
from pathlib import Path

from megatron_spin.config import Config
from megatron_spin.conversion.identity_record import RECORD, kept_identities
from megatron_spin.data.pairs import PairsManifest
from megatron_spin.errors import GateError, RunDirError
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.spin.objective import objective_class


@dataclasses.dataclass(frozen=True)
class Opponent:
    """The model that an iteration plays against."""

    hf: Path
    """Its Hugging Face directory, which generates."""
    checkpoint: Path
    """Megatron checkpoint directory of the same weights, in the trainer's own precision."""
    identity: str
    """Identity of the weights in ``hf``, as they are now."""
    shared_identity: str
    """The same in ``precision.shared_dtype``: that of a policy which starts from them."""


def read_opponent(config: Config, run_dir: RunDir, iteration: int) -> Opponent:
    """The opponent of ``iteration``; reads all its weights unless their identity is on record.

    Of several ranks one calls it for all.

    Raises:
        RunDirError: the previous iteration has not been exported, or the export was changed since.
        CheckpointError: the weights cannot be read.
    """
    hf = run_dir.opponent_hf(config, iteration)
    if iteration > 0 and not hf.is_dir():
        raise RunDirError(
            f"{hf} does not exist: iteration {iteration - 1} must be trained and exported first; run tools/spin.sh"
        )
    precision = config.precision
    kept = run_dir.base / RECORD if iteration == 0 else hf / RECORD
    known = kept_identities(hf, {precision.export_dtype, precision.shared_dtype}, kept)
    found = known[precision.export_dtype]
    record = run_dir.record(f"export:{iteration - 1}")
    exported = record.details.get("identity") if record is not None else None
    if exported is not None and found != exported:
        raise RunDirError(
            f"the opponent {hf} is {found[:12]}..., but iteration {iteration - 1} exported {exported[:12]}...: its "
            "weights were changed since; export again"
        )
    return Opponent(
        hf=hf,
        checkpoint=run_dir.opponent_checkpoint(iteration),
        identity=found,
        shared_identity=known[precision.shared_dtype],
    )


def check_made_for(opponent: Opponent, target: Target, manifest: PairsManifest, config: Config) -> None:
    """Refuses pairs that were made for another opponent; ``manifest`` is the pairs'.

    Raises:
        GateError: they were.
    """
    if manifest.opponent == opponent.identity:
        return
    remedy = "use a new --run-dir"
    if objective_class(config).generates:
        remedy = f"delete {target.generated} and {target.pairs} and generate again"
    raise GateError(
        f"{target.pairs} was made for opponent {manifest.opponent[:12]}, but {opponent.hf} is "
        f"{opponent.identity[:12]}: restore that model, or {remedy}"
    )
