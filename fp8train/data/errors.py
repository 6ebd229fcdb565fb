"""The error that the data package raises for what a user can mend."""

from fp8train.config.errors import UserError


class DataError(UserError):
    """A dataset, tokenizer or input text is missing, damaged, too small or does not fit the run."""
