"""Errors of models from and for elsewhere."""

from fp8train.config.errors import UserError


class HuggingFaceError(UserError):
    """A model cannot be imported or exported as asked."""
