"""The errors that a user can meet: one line each, and the exit code that goes with it."""

from typing import ClassVar


class MxError(Exception):
    """A foreseen failure; its text is one line that says what, where and the valid choices."""

    exit_code: ClassVar[int] = 1


class UsageError(MxError):
    """The request itself is wrong: an argument, a file that is not there or not what it says."""

    exit_code = 2


class ArtifactError(UsageError):
    """An artifact is missing a file, was changed, or was made for other versions."""


class PlanError(UsageError):
    """A precision plan does not fit the model or the target."""


class BudgetError(MxError):
    """No plan can meet the budget; the text says the smallest that can be met."""

    exit_code = 3


class VerificationError(MxError):
    """The compiled program is not close enough to the float model."""

    exit_code = 4


class UnsupportedError(MxError):
    """The model holds something that cannot be compiled; the text names the node."""

    exit_code = 5


class DeviceError(MxError):
    """A device cannot be reached."""

    exit_code = 6


class PassError(MxError):
    """A pass broke: a bug of the compiler, with the pass and its place in the pipeline."""
