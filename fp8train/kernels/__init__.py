"""Operations with more than one implementation: a reference in plain torch, and what a device does better.

``gemm`` is the FP8 matrix multiplication, whose implementation ``gemm_choice`` chooses once, when a model is
built: the tensor cores, for scales that ``scaling`` says they take, ``decode`` on devices without, or what a
package beside this one has (``te``). ``matmul`` is for products in high precision, ``attention`` for those of
attention.

What stands between GEMMs are *fused operations*, one launch or two each on a GPU (``fused_op``): casts
(``operands``), norms, activations and the rotation of heads. Formulas that are computed tile by tile are
declared once, for values, their amax and their cast (``tiled``).
"""
