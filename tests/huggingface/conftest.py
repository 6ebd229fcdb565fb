"""Tiny models run faster on one thread, and much faster beside other work."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """See tests/conftest.py; the big models of slow tests set their own number."""
