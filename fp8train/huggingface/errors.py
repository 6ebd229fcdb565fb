"""The error that imports and exports of models raise for what a user can mend."""

from fp8train.config.errors import UserError


class HuggingFaceError(UserError):
    """A model cannot be imported or exported as asked."""
