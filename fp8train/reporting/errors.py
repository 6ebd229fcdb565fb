"""Errors of reports."""

from fp8train.config.errors import UserError


class ReportError(UserError):
    """There is nothing to report, or it cannot be written."""
