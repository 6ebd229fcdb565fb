"""Launchers of the rotation against the layers', bit for bit, and against complex numbers in FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.kernels import rotary
from fp8train.kernels.operands import CastRule
from fp8train.kernels.rotary import heads_grad
from fp8train.layers.qkv import split_heads
from fp8train.layers.rotary import rotary_frequencies, rotary_table
from fp8train.precision.number_formats import E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.kernels.gpu.same import same
from tests.kernels.gpu.tiled import check_launchers, check_references

RULE = CastRule.of(QuantSpec(E5M2))
SHAPES = [(2, 40, 2, 4, 64), (1, 70, 1, 1, 128), (3, 5, 2, 3, 12), (2, 9, 3, 1, 2), (1, 16, 1, 2, 160)]
"""(B, S, G, P, D)"""
DTYPES = [torch.bfloat16, torch.float32]


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table(length: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return rotary_table(rotary_frequencies(head_dim, 1e4, None), length, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", [True, False])
def test_forward_and_backward_are_the_layers(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, rotated: bool
) -> None:
    batch, length, groups, queries, head_dim = shape
    cos, sin = table(length, head_dim) if rotated else (None, None)
    qkv = draw(batch, length, groups * (queries + 2) * head_dim, seed=0, dtype=dtype).requires_grad_()
    heads = split_heads(qkv, cos, sin, num_kv_heads=groups, head_dim=head_dim)
    args = (qkv.detach(), cos, sin, groups, head_dim)
    launched, reference = rotary._split_op.launch(*args), rotary._split_heads(*args)
    for ours, theirs, empty, layer in zip(
        launched, reference, rotary.split_heads_fake(*args), heads, strict=True
    ):
        assert same(ours, theirs)
        assert same(ours.transpose(1, 2), layer.detach())
        assert ours.shape == empty.shape and ours.is_contiguous()
    grads = [draw(*part.shape, seed=seed, dtype=dtype) for seed, part in enumerate(heads)]
    torch.autograd.backward(heads, grads)
    assert qkv.grad is not None
    strided = [grads[0].transpose(1, 2).contiguous().transpose(1, 2), grads[1].mT.contiguous().mT, grads[2]]
    inputs = (*strided, cos, sin)  # as attention's backward leaves them, turned, and contiguous
    for values in (check_launchers(heads_grad, inputs, RULE), check_references(heads_grad, inputs, RULE)):
        assert same(values.view(qkv.shape), qkv.grad)


def test_the_rotation_is_a_multiplication_of_complex_numbers() -> None:
    batch, length, groups, queries, head_dim = 1, 33, 2, 2, 16
    qkv = draw(batch, length, groups * (queries + 2) * head_dim, seed=0, dtype=torch.float32)
    exact = qkv.double().view(length, groups, queries + 2, 2, head_dim // 2)
    cos, sin = table(length, head_dim, torch.float64)
    turned = torch.complex(exact[:, :, :-1, 0], exact[:, :, :-1, 1]) * torch.complex(cos, sin)[:, None, None]
    expected = torch.cat((torch.stack((turned.real, turned.imag), dim=3), exact[:, :, -1:]), dim=2)
    query, key, value = rotary._split_op.launch(qkv, cos.float(), sin.float(), groups, head_dim)
    query = query.view(length, groups, queries, head_dim)
    found = torch.cat((query, key.view(length, groups, 1, -1), value.view(length, groups, 1, -1)), dim=2)
    torch.testing.assert_close(found.double().flatten(), expected.flatten(), rtol=1e-6, atol=1e-6)


def test_gradients_that_are_not_finite_spoil_their_pairs_alone() -> None:
    query, key, value = (draw(1, heads, 8, 16, seed=heads, dtype=torch.bfloat16) for heads in (4, 2, 2))
    query[0, 1, 3, 2], value[0, 0, 5, 15] = torch.nan, torch.inf
    cos, sin = table(8, 16)
    found = check_launchers(heads_grad, (query, key, value, cos, sin), RULE)
    assert same(found, heads_grad.forward(query, key, value, cos, sin))
    assert int(found.isnan().sum()) == 2 and int(found.isinf().sum()) == 1
