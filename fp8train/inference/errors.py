"""The error that loading and using a model raises for what a user can mend."""

from fp8train.config.errors import UserError


class InferenceError(UserError):
    """A model cannot be loaded or used as asked."""
