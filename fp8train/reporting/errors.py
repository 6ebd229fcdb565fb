"""The error that reports raise for what a user can mend."""

from fp8train.config.errors import UserError


class ReportError(UserError):
    """There is nothing to report, or it cannot be written."""
