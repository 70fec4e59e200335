"""Named errors and their exit statuses.

A message is one line that names the value, the rule and the remedy. Status 2 is for what the user can fix (input,
configuration, a full disk); status 1 for what the user did not cause (a gate that caught a numerical disagreement, a
defect).
"""


class SpinError(Exception):
    """Base of every error this package raises on purpose; printed as one line, never as a traceback."""

    exit_status = 2


class ConfigError(SpinError):
    """The configuration holds an unknown key, a value of the wrong type or values that contradict each other."""


class DataError(SpinError):
    """Input data are missing, malformed or empty after filtering."""


class CheckpointError(SpinError):
    """A checkpoint or a Hugging Face directory is missing, incomplete, corrupted or of another model."""


class RunDirError(SpinError):
    """The run directory is in use by another configuration, or lacks what an earlier phase should have left."""


class DeviceError(SpinError):
    """The device, kernel or numeric format that was asked for does not exist here."""


class GuardError(SpinError):
    """A guard whose action is ``stop`` tripped: what was trained is not fit to become the opponent, and the user is
    to decide.
    """


class GateError(SpinError):
    """Two computations that must agree do not: the run stops before it wastes or poisons anything."""

    exit_status = 1
