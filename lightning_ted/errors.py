"""The kinds of error that this package raises for what a user can cause.

Every message names the argument, the value that it got and the fix.
"""


class TEDError(ValueError):
    """Base of every error raised by this package."""


class LayoutError(TEDError):
    """Sizes that do not divide each other, or ranks that cannot be arranged as asked."""


class PlanError(TEDError):
    """A tensor-parallel plan that does not fit the module that it is applied to."""


class SpecError(TEDError):
    """A description of a MoE block that does not fit it."""


class UnsupportedError(TEDError):
    """A combination of settings that this package refuses."""


class CheckpointError(TEDError):
    """A checkpoint that is missing something, or does not fit the model."""


class VerificationError(TEDError):
    """A module that does not compute under a layout what it computes in one process, or that could not be run."""
