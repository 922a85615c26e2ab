"""The ONNX operators that step graphs use, in PyTorch.

`OPERATORS` maps an operator's name to a function that takes its node and gives what computes it: a function of the
node's inputs. `HOST_INPUTS` are the inputs that steer shapes; they are needed on the host before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import operators, reference
from .onnx_program import CACHED, Node

Compute = Callable[..., Any]  # inputs to the output, or to a tuple of outputs

HOST_INPUTS = {
    "Expand": (1,),
    "Range": (0, 1, 2),
    "ReduceL2": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "Tile": (1,),
    "Unsqueeze": (1,),
}
HOST_OUTPUTS = ("Shape",)
FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}  # by ONNX's numbers
OTHERS = {2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64, 9: torch.bool}
INTEGER_RANGE = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


class Unsupported(Exception):
    """A node in a form that is not here; the message says which."""


def attention(node: Node) -> Compute:
    """Inputs [S, heads, T, d], or [S, T, heads * d] with the number of heads in attributes; boolean or float mask."""
    unknown = set(node.attributes) - {"scale", "q_num_heads", "kv_num_heads"}
    if unknown:
        raise Unsupported(f"the attribute {sorted(unknown)[0]}")
    if len([name for name in node.inputs if name]) > 4 or len(node.outputs) > 1:
        raise Unsupported("more than query, key, value and mask")
    scale = node.attributes.get("scale")
    heads = node.attributes.get("q_num_heads"), node.attributes.get("kv_num_heads")

    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        flat = query.dim() == 3
        if flat:
            query = query.unflatten(-1, (heads[0], -1)).transpose(1, 2)
            key, value = (x.unflatten(-1, (heads[1], -1)).transpose(1, 2) for x in (key, value))
        grouped = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)
        return mixed.transpose(1, 2).flatten(2) if flat else mixed

    return compute


def cached_attention(node: Node) -> Compute:
    """query [S, H, T, d], new key and value [S, G, T, d], caches [S, G, C, d], first slot [S], mask [S, 1, T, C].

    Few tokens take our kernel; it writes the caches as it reads them.
    """
    scatter = tensor_scatter(replace(node, attributes={"axis": 2}))
    attend = attention(replace(node, inputs=node.inputs[:4], outputs=node.outputs[:1]))

    def compute(
        query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, first: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, d = query.shape[-2:]
        fits = T <= operators.MOST_TOKENS and operators.LEAST_HEAD_DIM <= d <= operators.MOST_HEAD_DIM
        if fits and mask.dtype == torch.bool and mask.shape[1] == 1:
            scale = node.attributes.get("scale", d**-0.5)
            mixed = operators.decode_attention(
                query, key, value, key_cache, value_cache, first, mask[:, 0].contiguous(), scale
            )
        else:
            for cache, new in ((key_cache, key), (value_cache, value)):
                scatter(cache, new, first)
            mixed = attend(query, key_cache, value_cache, mask)
        return mixed, key_cache, value_cache

    return compute


def tensor_scatter(node: Node) -> Compute:
    """Writes in place: the output of a state is the memory of its input."""
    axis, mode = node.attributes.get("axis", -2), node.attributes.get("mode", "linear")

    def compute(past: Tensor, update: Tensor, first: Tensor | None = None) -> Tensor:
        if first is not None and update.shape[axis] == 1:
            slots = first[:, None]  # [S, 1]
        else:
            slots = torch.arange(update.shape[axis], device=past.device)[None]  # [1, T]
            slots = slots if first is None else first[:, None] + slots  # [S, T]
        if mode == "circular":
            slots = slots % past.shape[axis]
        if past.shape[0] == 1:
            return past.index_copy_(axis, slots[0], update)
        streams = torch.arange(past.shape[0], device=past.device)[:, None]
        past.movedim(axis, 1)[streams, slots] = update.movedim(axis, 1)
        return past

    return compute


def layer_normalization(node: Node) -> Compute:
    axis, epsilon = node.attributes.get("axis", -1), node.attributes.get("epsilon", 1e-5)
    if len(node.outputs) > 1:
        raise Unsupported("outputs besides the norm")

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis:]
        return F.layer_norm(x, shape, weight.expand(shape), None if bias is None else bias.expand(shape), epsilon)

    return compute


def rms_normalization(node: Node) -> Compute:
    """In float32 at least, as the operator's `stash_type` says; the result has the type of the weight."""
    axis, epsilon = node.attributes.get("axis", -1), node.attributes.get("epsilon", 1e-5)

    def compute(x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[axis:], weight.to(wide).expand(x.shape[axis:]), epsilon).to(weight.dtype)

    return compute


def rotary_embedding(node: Node) -> Compute:
    """Inputs [S, heads, T, d], or [S, T, heads * d] with `num_heads`; cosines and sines [S, T, d / 2]."""
    if len([name for name in node.inputs if name]) > 3:
        raise Unsupported("position ids")
    for name in ("interleaved", "rotary_embedding_dim"):
        if node.attributes.get(name, 0):
            raise Unsupported(f"the attribute {name}")
    heads = node.attributes.get("num_heads", 0)

    def compute(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        flat = x.dim() == 3
        if flat:
            x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        turned: Tensor = operators.rotary(x, cos.contiguous(), sin.contiguous())
        return turned.transpose(1, 2).flatten(2) if flat else turned

    return compute


def reshape(node: Node) -> Compute:
    keep_zeros = node.attributes.get("allowzero", 0)

    def compute(x: Tensor, shape: Tensor) -> Tensor:
        sizes = shape.tolist()
        if not keep_zeros:
            sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
        return x.reshape(sizes)

    return compute


def unsqueeze(node: Node) -> Compute:
    def compute(x: Tensor, axes: Tensor) -> Tensor:
        rank = x.dim() + axes.numel()
        for axis in sorted(axis % rank for axis in axes.tolist()):
            x = x.unsqueeze(axis)
        return x

    return compute


def squeeze(node: Node) -> Compute:
    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))

    return compute


def reduce_l2(node: Node) -> Compute:
    keep = bool(node.attributes.get("keepdims", 1))

    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = None if axes is None else tuple(axes.tolist())
        wide = torch.promote_types(x.dtype, torch.float32)  # squares overflow float16
        length: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=keep, dtype=wide).to(x.dtype)
        return length

    return compute


def reduce(node: Node, over: Callable[..., Tensor]) -> Compute:
    """By what is given numbers, axes, and whether to keep these."""
    keep = bool(node.attributes.get("keepdims", 1))

    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        return over(x, tuple(range(x.dim())) if axes is None else tuple(axes.tolist()), keep)

    return compute


def slice_(node: Node) -> Compute:
    def compute(
        x: Tensor, starts: Tensor, stops: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
    ) -> Tensor:
        which = range(starts.numel()) if axes is None else axes.tolist()
        strides = [1] * starts.numel() if steps is None else steps.tolist()
        cut = [slice(None)] * x.dim()
        for axis, start, stop, stride in zip(which, starts.tolist(), stops.tolist(), strides, strict=True):
            if stride < 0:
                raise ValueError(f"Slice with the step {stride}")
            cut[axis] = slice(start, stop, stride)
        return x[tuple(cut)]

    return compute


def range_(node: Node) -> Compute:
    """Its device is an attribute: nothing that enters it lies on one."""
    device = node.attributes["device"]
    return lambda start, stop, step: torch.arange(start.item(), stop.item(), step.item(), device=device)


def expand(node: Node) -> Compute:
    def compute(x: Tensor, shape: Tensor) -> Tensor:
        return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))

    return compute


def cast(node: Node) -> Compute:
    dtype = {**FLOATS, **OTHERS}.get(node.attributes["to"])
    if dtype is None:
        raise Unsupported(f"the data type {node.attributes['to']}")
    return lambda x: x.to(dtype)


def gather(node: Node) -> Compute:
    axis = node.attributes.get("axis", 0)

    def compute(x: Tensor, indices: Tensor) -> Tensor:
        flat = indices.flatten()
        picked = x.index_select(axis, torch.where(flat < 0, flat + x.shape[axis], flat))
        return picked.reshape((*x.shape[: axis % x.dim()], *indices.shape, *x.shape[axis % x.dim() + 1 :]))

    return compute


def quantize_linear(node: Node) -> Compute:
    axis = node.attributes.get("axis", 1)
    without_zero = OTHERS.get(node.attributes.get("output_dtype", 0), torch.uint8)

    def compute(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        kind = zero.dtype if zero is not None else without_zero
        low, high = INTEGER_RANGE[kind]
        steps = torch.round(x / _along(scale, x, axis))
        if zero is not None:
            steps = steps + _along(zero, x, axis)
        return steps.clamp(low, high).to(kind)

    return compute


def dequantize_linear(node: Node) -> Compute:
    axis, block = node.attributes.get("axis", 1), node.attributes.get("block_size", 0)
    asked = FLOATS.get(node.attributes.get("output_dtype", 0))

    def compute(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        steps = x.to(scale.dtype)
        if block:  # a scale for so many values in a row
            scale, zero = (None if s is None else s.repeat_interleave(block, dim=axis) for s in (scale, zero))
            return ((steps if zero is None else steps - zero) * scale).to(asked or scale.dtype)
        if zero is not None:
            steps = steps - _along(zero, x, axis).to(scale.dtype)
        return (steps * _along(scale, x, axis)).to(asked or scale.dtype)

    return compute


def mod(node: Node) -> Compute:
    compute: Compute = torch.fmod if node.attributes.get("fmod", 0) else torch.remainder
    return compute


def gelu(node: Node) -> Compute:
    kind = node.attributes.get("approximate", "none")
    return lambda x: F.gelu(x, approximate=kind)


def clip(node: Node) -> Compute:
    return lambda x, low=None, high=None: torch.clamp(x, low, high)


def gemm(node: Node) -> Compute:
    turned = [node.attributes.get(name, 0) for name in ("transA", "transB")]
    if node.attributes.get("alpha", 1.0) != 1.0 or node.attributes.get("beta", 1.0) != 1.0:
        raise Unsupported("a factor")

    def compute(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = (x.t() if turn else x for x, turn in zip((a, b), turned, strict=True))
        return a @ b if c is None else torch.addmm(c, a, b)

    return compute


def linear(node: Node) -> Compute:
    """x [..., in] @ weight [in, out] + bias [out]"""

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        product = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        return product.view(*x.shape[:-1], weight.shape[1])

    return compute


def linear_group(node: Node) -> Compute:
    """Several products of one input; the results are slices of one tensor."""
    sizes, product = node.attributes["sizes"], linear(node)

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(product(x, weight, bias).split(sizes, dim=-1))

    return compute


def block_linear(node: Node) -> Compute:
    """x [..., in] by integers in blocks, as `operators.block_linear` has them, plus a bias [out] or None.

    The last input is memory for a part of the matrix in floating numbers, which many rows are multiplied by.
    """
    bits = node.attributes["bits"]

    def compute(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, widened: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] <= operators.MOST_TOKENS:
            product = operators.block_linear(rows, weight, scale, bias, bits)
        else:
            product = _by_parts(rows, weight, scale, bias, bits, widened.view(x.dtype))
        return product.view(*x.shape[:-1], weight.shape[1])

    return compute


def _by_parts(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, widened: Tensor) -> Tensor:
    """A product of which as many outputs at a time are widened as fit into `widened`."""
    inputs, outputs = rows.shape[1], weight.shape[1]
    product = rows.new_empty(rows.shape[0], outputs)
    most = widened.numel() // inputs
    for first in range(0, outputs, most):
        count = min(most, outputs - first)
        matrix, part = widened[: count * inputs].view(count, inputs), slice(first, first + count)
        operators.widen_blocks(weight, scale, matrix, bits, first)
        product[:, part] = F.linear(rows, matrix, None if bias is None else bias[part])
    return product


def block_linear_group(node: Node) -> Compute:
    sizes, product = node.attributes["sizes"], block_linear(node)

    def compute(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(product(*given).split(sizes, dim=-1))

    return compute


def residual_norm(node: Node) -> Compute:
    """A sum and its norm. A sum that only leads to further ones is kept in float32: it is rounded once a layer else."""
    epsilon, wide = node.attributes["epsilon"], node.attributes["wide"]

    def compute(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, update = torch.broadcast_tensors(x, update)
        x = x.float() if wide else x.to(update.dtype)
        weight, bias = (None if part is None else part.expand(x.shape[-1:]).contiguous() for part in (weight, bias))
        norm = operators.residual_norm if x.shape[-1] <= operators.MOST_WIDTH else reference.residual_norm
        total, normed = norm(x.contiguous(), update.contiguous(), weight, bias, epsilon)
        return total, normed

    return compute


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """A scalar, or values along one axis of x, in a shape that broadcasts."""
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if index == axis % x.dim() else 1 for index in range(x.dim())])


OPERATORS: dict[str, Callable[[Node], Compute]] = {
    "Abs": lambda node: torch.abs,
    "Add": lambda node: torch.add,
    "And": lambda node: torch.logical_and,
    "Attention": attention,
    CACHED: cached_attention,
    "Cast": cast,
    "Clip": clip,
    "Concat": lambda node: lambda *parts: torch.cat(parts, dim=node.attributes["axis"]),
    "DequantizeLinear": dequantize_linear,
    "Div": lambda node: torch.div,
    "Equal": lambda node: torch.eq,
    "Erf": lambda node: torch.erf,
    "Exp": lambda node: torch.exp,
    "Expand": expand,
    "Gather": gather,
    "Gelu": gelu,
    "Gemm": gemm,
    "GreaterOrEqual": lambda node: torch.ge,
    "HardSwish": lambda node: F.hardswish,
    "Identity": lambda node: lambda x: x,
    "LayerNormalization": layer_normalization,
    "LeakyRelu": lambda node: lambda x: F.leaky_relu(x, node.attributes.get("alpha", 0.01)),
    "Less": lambda node: torch.lt,
    "LessOrEqual": lambda node: torch.le,
    "MatMul": lambda node: torch.matmul,
    "Min": lambda node: torch.minimum,
    "Mish": lambda node: F.mish,
    "Mod": mod,
    "Mul": lambda node: torch.mul,
    "Neg": lambda node: torch.neg,
    "Not": lambda node: torch.logical_not,
    "Or": lambda node: torch.logical_or,
    "QuantizeLinear": quantize_linear,
    "RMSNormalization": rms_normalization,
    "Range": range_,
    "Reciprocal": lambda node: torch.reciprocal,
    "ReduceL2": reduce_l2,
    "ReduceMax": lambda node: reduce(node, torch.amax),
    "ReduceMean": lambda node: reduce(node, torch.mean),
    "Relu": lambda node: torch.relu,
    "Reshape": reshape,
    "RotaryEmbedding": rotary_embedding,
    "Shape": lambda node: lambda x: torch.tensor(x.shape),
    "Sigmoid": lambda node: torch.sigmoid,
    "Slice": slice_,
    "Softplus": lambda node: F.softplus,
    "Sqrt": lambda node: torch.sqrt,
    "Squeeze": squeeze,
    "Sub": lambda node: torch.sub,
    "Tanh": lambda node: torch.tanh,
    "TensorScatter": tensor_scatter,
    "Tile": lambda node: lambda x, repeats: x.tile(repeats.tolist()),
    "Transpose": lambda node: lambda x: x.permute(node.attributes["perm"]),
    "Unsqueeze": unsqueeze,
    # of our own rewrites
    "BlockLinear": block_linear,
    "BlockLinearGroup": block_linear_group,
    "Linear": linear,
    "LinearGroup": linear_group,
    "ResidualNorm": residual_norm,
    "Select": lambda node: lambda x: x.select(node.attributes["axis"], node.attributes["index"]),
    "Silu": lambda node: F.silu,
}
