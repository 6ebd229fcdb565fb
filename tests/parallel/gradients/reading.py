"""Whole reduced gradients, which the package only reads in pieces."""

from torch import Tensor

from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.store import GradientStore


def gradient_of(store: GradientStore, fqn: str) -> Tensor:
    """The reduced gradient of a parameter, of its shape, where this rank receives all of it."""
    found = [(bucket, i) for bucket in store.buckets for i, m in enumerate(bucket.members) if m.fqn == fqn]
    ((bucket, member),) = found
    return gradient_in(bucket, member)


def gradient_in(bucket: Bucket, member: int) -> Tensor:
    """Likewise, of a member of a bucket."""
    assert not bucket.scattered
    described = bucket.members[member]
    return bucket.held.chunk(member, 0, described.numel).view(described.shape)
