"""The running softmax of attention over tiles of slots, base 2."""

# Triton reads the signatures of its functions itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tile(q, k, v, visible, m, length, acc, scale):
    """Take one tile of slots into a running attention.

    q [M, D], k and v [N, D] of one dtype, visible [M, N]; float32 m [M] largest logit, length [M] sum of weights, acc
    [M, D] weighted values; scale of the logits times log2(e).
    """
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    logits = tl.where(visible, logits, float("-inf"))
    m_next = tl.maximum(m, tl.max(logits, axis=1))
    # a row that has seen nothing yet has no largest logit; -inf - -inf would be NaN
    base = tl.where(m_next == float("-inf"), 0.0, m_next)
    keep = tl.exp2(m - base)
    weights = tl.exp2(logits - base[:, None])
    length = length * keep + tl.sum(weights, axis=1)
    acc = acc * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return m_next, length, acc
