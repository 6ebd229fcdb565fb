"""The amax of a gradient, from the function whose backward wrote it to the one that casts it.

A norm's backward writes the gradient of the branch that joined before it, and finds its amax in the same
pass. The branch's last GEMM casts that gradient next. Autograd hands over the tensor alone, so the partials
go beside it, in an object that both functions hold. They are taken only for the very memory that was written.
"""

from __future__ import annotations

from torch import Tensor


class GradientAmax:
    """Partials of the amax of one gradient, put once in a backward and taken once."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, Tensor] | None = None

    def put(self, gradient: Tensor, partials: Tensor) -> None:
        """Keep the ``partials`` of a gradient, and the gradient, so that its memory stays its own."""
        self._known = gradient, gradient._version, partials

    def take(self, gradient: Tensor) -> Tensor | None:
        """The partials of ``gradient``, and forget them; None if it is not what was put, unchanged."""
        known, self._known = self._known, None
        if known is None:
            return None
        written, version, partials = known
        alike = (written.numel(), written.dtype) == (gradient.numel(), gradient.dtype)
        alike = alike and gradient.is_contiguous() and written.data_ptr() == gradient.data_ptr()
        return partials if alike and gradient._version == version else None
