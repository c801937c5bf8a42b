"""Does a user's module compute under a layout what it computes in one process? On local CPU processes."""

from lightning_ted.verify.report import ParameterRow, VerificationReport
from lightning_ted.verify.run import verify

__all__ = ["ParameterRow", "VerificationReport", "verify"]
