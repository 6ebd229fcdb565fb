"""Errors of using a model."""

from fp8train.config.errors import UserError


class InferenceError(UserError):
    """A model cannot be loaded or used as asked."""
