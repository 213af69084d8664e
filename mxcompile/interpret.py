"""Evaluate an ONNX model with torch, node by node.

The float reference that calibration watches: inputs of any node can be tapped, any value can be
overridden, and what an override does not reach need not be computed again. An operator is one
torch function; its positional parameters are the inputs (None where left out), its keyword
parameters the attributes with ONNX's defaults. All are differentiable as far as their meaning
allows and none changes its inputs. Model-local functions run as their bodies.

Left out: control flow, sequences, strings, recurrent operators, and training.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from mxcompile.errors import UnsupportedError
from mxcompile.graph import describe, name

Values: TypeAlias = dict[str, Tensor]
Tap: TypeAlias = Callable[[ir.Node, Sequence[Tensor | None]], None]
Operator: TypeAlias = Callable[..., Tensor | Sequence[Tensor]]

DTYPES: Final[Mapping[ir.DataType, torch.dtype]] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
}
"""What holds a value of each ONNX type; codes of less than a byte take a byte each."""

_CODES: Final = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT16: (-(1 << 15), (1 << 15) - 1),
    ir.DataType.UINT16: (0, (1 << 16) - 1),
}


@dataclass(frozen=True, slots=True)
class _Step:
    """A node, and the function that computes its outputs from its inputs."""

    node: ir.Node
    call: Operator

    def run(self, arguments: Sequence[Tensor | None]) -> dict[str, Tensor]:
        results = self.call(*arguments)
        results = (results,) if isinstance(results, Tensor) else results
        outputs = [v for v in self.node.outputs if v.name]
        if len(results) < len(outputs):
            raise UnsupportedError(
                f"{describe(self.node)}: output '{outputs[len(results)].name}' is not supported"
            )
        return {name(v): r for v, r in zip(self.node.outputs, results, strict=False) if v.name}


class Interpreter:
    """Runs a model, on several threads if need be; weights stay mapped to the model's files.

    Raises:
        UnsupportedError: an operator or attribute that has no torch function here.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._steps = _compile(model.graph, model.functions, {})
        self._constants: Values = {}
        self._loading = Lock()

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        overrides: Mapping[str, Tensor] | None = None,
        fetch: Collection[str] | None = None,
        tap: Tap | None = None,
        keep: bool = False,
    ) -> Values:
        """Compute the graph's outputs.

        Args:
            inputs: The graph's inputs by name.
            overrides: Values that replace initializers or computed values, by name.
            fetch: What to compute in place of the graph's outputs.
            tap: Called with every node that is computed and its inputs.
            keep: Whether to return all computed values, for ``rerun``, and not only what is
                fetched; without it a value is freed after its last use.
        """
        known = {**inputs, **(overrides or {})}
        wanted = self._wanted(fetch, known)
        values = self._evaluate(known, {}, wanted, fetch, tap, keep=keep)
        return {**inputs, **values} if keep else values

    def rerun(
        self,
        values: Values,
        overrides: Mapping[str, Tensor],
        *,
        fetch: Collection[str] | None = None,
        tap: Tap | None = None,
    ) -> Values:
        """Compute the outputs again with some values overridden.

        Args:
            values: What ``run`` returned with ``keep``; only what depends on an overridden value
                is computed again.
            overrides: Values that replace initializers or computed values, by name.
            fetch: What to compute in place of the graph's outputs.
            tap: Called with every node that is computed and its inputs.
        """
        dirty = set(overrides)
        affected: set[ir.Node] = set()
        for step in self._steps:
            if any(v is not None and v.name in dirty for v in step.node.inputs):
                affected.add(step.node)
                dirty.update(name(v) for v in step.node.outputs)
        wanted = self._wanted(fetch, overrides) & affected
        return self._evaluate(overrides, values, wanted, fetch, tap, keep=False)

    def needed(self, fetch: Collection[str], known: Collection[str]) -> list[ir.Node]:
        """The nodes that compute ``fetch`` when some values are known, in order."""
        wanted = self._wanted(fetch, known)
        return [step.node for step in self._steps if step.node in wanted]

    def _targets(self, fetch: Collection[str] | None) -> Collection[str]:
        return [name(v) for v in self._graph.outputs] if fetch is None else fetch

    def _wanted(self, fetch: Collection[str] | None, known: Collection[str]) -> set[ir.Node]:
        """The nodes that ``fetch`` needs when some values are known."""
        needed = set(self._targets(fetch)) - set(known)
        wanted: set[ir.Node] = set()
        for step in reversed(self._steps):
            if any(v.name in needed for v in step.node.outputs):
                wanted.add(step.node)
                needed.update(v.name for v in step.node.inputs if v is not None and v.name)
                needed.difference_update(known)
        return wanted

    def _evaluate(
        self,
        known: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        wanted: set[ir.Node],
        fetch: Collection[str] | None,
        tap: Tap | None,
        *,
        keep: bool,
    ) -> Values:
        """Run the wanted nodes on top of known values and of values from an earlier run."""
        steps = [step for step in self._steps if step.node in wanted]
        last = {v: i for i, step in enumerate(steps) for v in step.node.inputs if v is not None}
        targets = set(self._targets(fetch))
        values: Values = {}

        def find(value: ir.Value | None) -> Tensor | None:
            if value is None or not value.name:
                return None
            for where in (known, values, before):
                if (found := where.get(value.name)) is not None:
                    return found
            return self._constant(value.name)

        for index, step in enumerate(steps):
            arguments = [find(v) for v in step.node.inputs]
            if tap is not None:
                tap(step.node, arguments)
            values.update(step.run(arguments))
            if not keep:
                done = {v.name for v in step.node.inputs if v is not None and last[v] == index}
                done.update(v.name for v in step.node.outputs if v not in last)
                for value in done - targets:
                    values.pop(value or "", None)
        if keep:
            return {**values, **known}
        by_name = {name(v): v for v in self._graph.outputs}
        found = {t: find(by_name.get(t) or ir.Value(name=t)) for t in targets}
        return {t: v for t, v in found.items() if v is not None}

    def _constant(self, key: str) -> Tensor:
        # Threads may run one model, and onnx-ir maps a file's tensor once and not twice.
        with self._loading:
            return self._loaded(key)

    def _loaded(self, key: str) -> Tensor:
        if key not in self._constants:
            constant = (
                self._graph.initializers[key].const_value
                if key in self._graph.initializers
                else None
            )
            if constant is None:
                raise KeyError(f"no value for '{key}'")
            self._constants[key] = tensor(constant)
        return self._constants[key]


def tensor(constant: ir.TensorProtocol) -> Tensor:
    """A constant as a torch tensor that shares its memory where it can; do not write to it."""
    data = np.asarray(constant.numpy())
    if data.dtype == ml_dtypes.bfloat16:
        return _share(data.view(np.uint16)).view(torch.bfloat16)
    if constant.dtype in _CODES and data.dtype.kind == "V":
        data = data.astype(np.int8 if _CODES[constant.dtype][0] else np.uint8)
    if constant.dtype not in DTYPES:
        raise UnsupportedError(
            f"tensor '{constant.name}' of type {constant.dtype} is not supported"
        )
    return _share(data)


def _share(data: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # A mapped file is read-only, which torch cannot express; no operator here writes.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(data)


def _compile(
    nodes: Iterable[ir.Node],
    functions: Mapping[ir.OperatorIdentifier, ir.Function],
    bound: Mapping[str, Any],
) -> list[_Step]:
    """Look up every node's function; ``bound`` holds the attributes of the call around them."""
    return [_Step(node, _operator(node, functions, bound)) for node in nodes]


def _operator(
    node: ir.Node,
    functions: Mapping[ir.OperatorIdentifier, ir.Function],
    bound: Mapping[str, Any],
) -> Operator:
    attributes = _attributes(node, bound)
    if (function := functions.get(node.op_identifier())) is not None:
        defaults = {
            a.name: _plain(a.value) for a in function.attributes.values() if a.value is not None
        }
        return _body(function, _compile(function, functions, {**defaults, **attributes}))
    operator = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if operator is None:
        label = node.name or name(node.outputs[0])
        raise UnsupportedError(
            f"node {label}: op {node.domain or 'ai.onnx'}::{node.op_type} is not supported"
        )
    if unknown := attributes.keys() - _parameters(operator):
        raise UnsupportedError(f"{describe(node)}: attribute {sorted(unknown)[0]} is not supported")
    if node.op_type == "QuantizeLinear" and len(node.inputs) > 2 and node.inputs[2] is not None:
        attributes["output_dtype"] = node.inputs[2].dtype or ir.DataType.UINT8
    return partial(operator, **attributes)


def _parameters(operator: Operator) -> set[str]:
    try:
        return set(inspect.signature(operator).parameters)
    except ValueError:  # torch's built-in functions have none; they stand for operators without
        return set()


def _attributes(node: ir.Node, bound: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for attribute in node.attributes.values():
        if not attribute.is_ref():
            result[attribute.name] = _plain(attribute.value)
        elif (outer := attribute.ref_attr_name or "") in bound:
            result[attribute.name] = bound[outer]
    return result


def _plain(value: Any) -> Any:
    return tensor(value) if isinstance(value, ir.TensorProtocol) else value


def _body(function: ir.Function, steps: Sequence[_Step]) -> Operator:
    def call(*arguments: Tensor | None) -> Sequence[Tensor]:
        given = zip(function.inputs, arguments, strict=False)
        values: dict[str | None, Tensor] = {v.name: a for v, a in given if a is not None}
        for step in steps:
            values.update(
                step.run([None if v is None else values.get(v.name) for v in step.node.inputs])
            )
        return [values[v.name] for v in function.outputs]

    return call


# Arithmetic and logic


def _div(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _pow(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


def _mod(x: Tensor, y: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(x, y) if fmod else torch.remainder(x, y)


def _sum(*xs: Tensor) -> Tensor:
    result = xs[0]
    for x in xs[1:]:
        result = result + x
    return result


def _mean(*xs: Tensor) -> Tensor:
    return _sum(*xs) / len(xs)


def _max(*xs: Tensor) -> Tensor:
    result = xs[0]
    for x in xs[1:]:
        result = torch.maximum(result, x)
    return result


def _min(*xs: Tensor) -> Tensor:
    result = xs[0]
    for x in xs[1:]:
        result = torch.minimum(result, x)
    return result


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    # ONNX lets the upper bound win where the bounds cross.
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(_dtype(to))


def _cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(like.dtype)


def _dtype(code: int) -> torch.dtype:
    if (dtype := DTYPES.get(ir.DataType(code))) is None:
        raise UnsupportedError(f"type {ir.DataType(code)} is not supported")
    return dtype


def _is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    return (torch.isposinf(x) & bool(detect_positive)) | (torch.isneginf(x) & bool(detect_negative))


# Activations


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _hard_swish(x: Tensor) -> Tensor:
    return x * _hard_sigmoid(x, alpha=1 / 6)


def _leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return functional.leaky_relu(x, alpha)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.elu(x, alpha)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


def _softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def _log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return x.log_softmax(axis)


# Reductions


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    """An operator ``Reduce*`` from a function of a tensor, the axes and whether they stay."""

    def operator(
        x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        dims = [] if axes is None else [int(a) % x.dim() for a in axes]
        if not dims and noop_with_empty_axes:
            return x
        return function(x, dims or list(range(x.dim())), bool(keepdims))

    return operator


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = x.prod(dim, keepdim=keep, dtype=x.dtype)
    return x


def _arg(function: Callable[..., Tensor]) -> Operator:
    def operator(
        x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0
    ) -> Tensor:
        if select_last_index:
            return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=bool(keepdims))
        return function(x, axis, keepdim=bool(keepdims))

    return operator


def _top_k(
    x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> Sequence[Tensor]:
    return torch.topk(x, int(k), axis, bool(largest), bool(sorted))


def _cumsum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = int(axis)
    x = x.flip(dim) if reverse else x
    total = x.cumsum(dim, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(dim) if reverse else total


# Shapes


def _constant(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> Tensor:
    if value is not None:
        return value
    if value_float is not None or value_floats is not None:
        return torch.tensor(
            value_floats if value_float is None else value_float, dtype=torch.float32
        )
    return torch.tensor(value_ints if value_int is None else value_int, dtype=torch.int64)


def _constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    return (
        torch.zeros(shape.tolist()) if value is None else value.reshape(()).expand(shape.tolist())
    )


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = shape.tolist()
    if not allowzero:
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(*(perm or reversed(range(x.dim()))))


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(int(a) % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(*xs: Tensor, axis: int) -> Tensor:
    return torch.cat(xs, axis)


def _split(
    x: Tensor, split: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> Sequence[Tensor]:
    if split is not None:
        return torch.split(x, split.tolist(), axis)
    return torch.split(x, -(-x.shape[axis] // (num_outputs or 2)), axis)


def _slice(
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    count = starts.numel()
    dims = range(count) if axes is None else axes.tolist()
    strides = [1] * count if steps is None else steps.tolist()
    for dim, start, end, step in zip(dims, starts.tolist(), ends.tolist(), strides, strict=True):
        picked = range(*slice(start, end, step).indices(x.shape[dim]))
        if step == 1:
            x = x.narrow(dim, min(picked.start, x.shape[dim]), len(picked))
        else:
            x = x.index_select(dim, torch.tensor(list(picked), dtype=torch.int64))
    return x


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis = axis % x.dim()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    picked = x.index_select(axis, indices.reshape(-1))
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    index = list(indices.unbind(-1))
    for dim in reversed(range(batch_dims)):
        shape = [1] * (indices.dim() - 1)
        shape[dim] = x.shape[dim]
        index.insert(0, torch.arange(x.shape[dim]).reshape(shape))
    return x[tuple(index)]


def _scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction not in ("none", "add"):
        raise UnsupportedError(f"ScatterND with reduction {reduction} is not supported")
    return x.index_put(tuple(indices.unbind(-1)), updates, accumulate=reduction == "add")


def _scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    reductions = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, indices, updates, reductions[reduction])


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    sizes = [1] * (x.dim() - len(sizes)) + sizes
    have = [1] * (len(sizes) - x.dim()) + list(x.shape)
    # Unlike torch's, this shape may be the smaller one: 1 keeps the input's size.
    return x.expand([b if a == 1 else a for a, b in zip(have, sizes, strict=True)])


def _tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(*repeats.tolist())


def _trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return x.triu(diagonal) if upper else x.tril(diagonal)


def _one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(depth)
    hot = functional.one_hot(indices.long() % count, count).movedim(-1, axis)
    return torch.where(hot.bool(), values[1], values[0])


def _non_zero(x: Tensor) -> Tensor:
    return x.nonzero().T


def _pad(
    x: Tensor,
    pads: Tensor,
    value: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    dims = list(range(x.dim())) if axes is None else [int(a) % x.dim() for a in axes]
    before, after = pads.tolist()[: len(dims)], pads.tolist()[len(dims) :]
    if mode == "constant":
        amounts = [0] * (2 * x.dim())
        for dim, low, high in zip(dims, before, after, strict=True):
            amounts[2 * (x.dim() - 1 - dim) : 2 * (x.dim() - dim)] = low, high
        return functional.pad(x, amounts, value=0 if value is None else value.item())
    for dim, low, high in zip(dims, before, after, strict=True):
        size = x.shape[dim]
        index = torch.arange(-low, size + high)
        if mode == "edge":
            index = index.clamp(0, size - 1)
        elif mode == "wrap":
            index = index % size
        else:
            index = size - 1 - (index.abs() - (size - 1)).abs()
        x = x.index_select(dim, index)
    return x


def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    size, depth = blocksize, c // blocksize**2
    if mode == "DCR":
        x = x.reshape(n, size, size, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, depth, size, size, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, depth, h * size, w * size)


def _space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // blocksize, w // blocksize)


# Products and norms


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


def _einsum(*xs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *xs)


def _layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    normal = functional.layer_norm(x, x.shape[axis:], None, None, epsilon) * scale
    return normal if bias is None else normal + bias


def _rms_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return functional.rms_norm(x, x.shape[axis:], None, epsilon) * scale


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    if training_mode:
        raise UnsupportedError("BatchNormalization in training mode is not supported")
    return functional.batch_norm(x, mean, variance, scale, bias, eps=epsilon)


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _group_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


def _lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    return functional.normalize(x, p, axis, eps=0)


# Attention


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int = 1,
) -> Sequence[Tensor]:
    flat = q.dim() == 3
    if flat:
        q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    present = k, v
    if (repeats := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    # The root goes to both sides, as ONNX defines it, so that float16 does not overflow.
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = (q * root) @ (k * root).transpose(-1, -2)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    bias = _bias(scores, mask, 0 if past_key is None else past_key.shape[2], causal=bool(is_causal))
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1)
    if bias is not None:  # a query that may look nowhere sees zeros
        weights = torch.where((bias == -torch.inf).all(-1, keepdim=True), 0, weights)
    y = weights @ v
    if flat:
        y = y.transpose(1, 2).flatten(2)
    return y, *present


def _heads(x: Tensor, count: int | None) -> Tensor:
    assert count is not None
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _bias(scores: Tensor, mask: Tensor | None, past: int, *, causal: bool) -> Tensor | None:
    """What is added to the scores: 0 where a query may look, -inf where it may not."""
    queries, keys = scores.shape[-2:]
    bias = None
    if mask is not None:
        bias = (
            torch.where(mask, 0.0, -torch.inf).to(scores.dtype)
            if mask.dtype == torch.bool
            else mask
        )
        if (missing := keys - mask.shape[-1]) > 0:
            bias = functional.pad(bias, (0, missing), value=-torch.inf)
    if causal:
        ahead = torch.ones(queries, keys, dtype=torch.bool).triu(past + 1)
        later = torch.zeros(queries, keys, dtype=scores.dtype).masked_fill(ahead, -torch.inf)
        bias = later if bias is None else bias + later
    return bias


def _rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    by_head = x.transpose(1, 2) if x.dim() == 4 else x.reshape(*x.shape[:2], num_heads, -1)
    width = rotary_embedding_dim or by_head.shape[-1]
    turned, rest = by_head[..., :width], by_head[..., width:]
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((cos * a - sin * b, sin * a + cos * b), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((cos * a - sin * b, sin * a + cos * b), -1)
    y = torch.cat((turned, rest), -1)
    return y.transpose(1, 2) if x.dim() == 4 else y.reshape(x.shape)


# Quantization


def _spread(x: Tensor, by_block: Tensor, axis: int, block_size: int) -> Tensor:
    """Scales or zero-points in the shape of ``x``, or one that broadcasts to it."""
    if block_size:
        return by_block.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    if by_block.numel() == 1:
        return by_block.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return by_block.reshape(shape)


def _dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    steps = x.to(scale.dtype)
    if zero is not None:
        steps = steps - _spread(x, zero.to(scale.dtype), axis, block_size)
    result = steps * _spread(x, scale, axis, block_size)
    return result.to(_dtype(output_dtype)) if output_dtype else result


def _quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    dtype = ir.DataType(output_dtype or ir.DataType.UINT8)
    if dtype not in _CODES:
        raise UnsupportedError(f"QuantizeLinear to {dtype} is not supported")
    steps = (x / _spread(x, scale, axis, block_size)).round()
    if zero is not None:
        steps = steps + _spread(x, zero.to(steps.dtype), axis, block_size)
    return steps.clamp(*_CODES[dtype]).to(DTYPES[dtype])


# Convolutions, pools and resizing


def windows(
    x: Tensor,
    kernel: Sequence[int],
    auto_pad: str,
    pads: Sequence[int] | None,
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """The padding before and after each spatial axis."""
    if auto_pad in ("NOTSET", "VALID"):
        rank = len(kernel)
        flat = pads or [0] * (2 * rank)
        return list(zip(flat[:rank], flat[rank:], strict=True))
    found = []
    for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        outputs = -(-size // stride)
        total = max((outputs - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return found


def padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad the spatial axes."""
    flat = [amount for pair in reversed(pads) for amount in pair]
    return functional.pad(x, flat, value=value) if any(flat) else x


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    kernel = weight.shape[2:]
    strides, dilations = strides or [1] * len(kernel), dilations or [1] * len(kernel)
    x = padded(x, windows(x, kernel, auto_pad, pads, strides, dilations))
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
    return function(x, weight, bias, tuple(strides), 0, tuple(dilations), group)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    if auto_pad not in ("NOTSET", "VALID"):
        raise UnsupportedError(f"ConvTranspose with auto_pad {auto_pad} is not supported")
    rank = weight.dim() - 2
    function = (
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )[rank - 1]
    extra = output_padding or [0] * rank
    full = function(
        x, weight, bias, tuple(strides or [1] * rank), 0, 0, group, tuple(dilations or [1] * rank)
    )
    cuts = windows(x, weight.shape[2:], "NOTSET", pads, [], [])
    # Output padding is where the cut at the end falls short; beyond it only the bias is left.
    edges = [(-low, more - high) for (low, high), more in zip(cuts, extra, strict=True)]
    if bias is None or not any(high > 0 for _, high in edges):
        return padded(full, edges)
    bias = bias.reshape(-1, *[1] * rank)
    return padded(full - bias, edges) + bias


def _pool_pads(
    x: Tensor,
    kernel: Sequence[int],
    auto_pad: str,
    pads: Sequence[int] | None,
    strides: Sequence[int],
    dilations: Sequence[int],
    ceil_mode: int,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The padding that is asked for, and what a last partial window needs beyond it."""
    given = windows(x, kernel, auto_pad, pads, strides, dilations)
    extra = []
    for size, (low, high), width, stride, dilation in zip(
        x.shape[2:], given, kernel, strides, dilations, strict=True
    ):
        reach = (width - 1) * dilation + 1
        room = size + low + high - reach
        outputs = (-(-room // stride) if ceil_mode else room // stride) + 1
        if (outputs - 1) * stride >= size + low:
            outputs -= 1
        extra.append((0, max((outputs - 1) * stride - room, 0)))
    return given, extra


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    given, extra = _pool_pads(x, kernel_shape, auto_pad, pads, strides, dilations, ceil_mode)
    x = padded(padded(x, given, -math.inf), extra, -math.inf)
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    pooled: Tensor = function(x, tuple(kernel_shape), tuple(strides), 0, tuple(dilations))
    return pooled


def _average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    if any(d != 1 for d in dilations or ()):
        raise UnsupportedError("AveragePool with dilations is not supported")
    strides = strides or [1] * rank
    given, extra = _pool_pads(x, kernel_shape, auto_pad, pads, strides, [1] * rank, ceil_mode)
    function = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]
    pool = partial(function, kernel_size=tuple(kernel_shape), stride=tuple(strides))
    counted = padded(torch.ones_like(x[:1, :1]), given, float(count_include_pad))
    return pool(padded(padded(x, given), extra)) / pool(padded(counted, extra))


def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def _global_max_pool(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def _resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    mode: str = "nearest",
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    antialias: int = 0,
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    if antialias or mode == "cubic" or keep_aspect_ratio_policy != "stretch":
        raise UnsupportedError("Resize is supported without antialias, cubic and aspect policies")
    dims = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    for index, dim in enumerate(dims):
        size = x.shape[dim]
        if sizes is not None and sizes.numel():
            target = int(sizes[index])
            scale = target / size
        else:
            assert scales is not None
            scale = float(scales[index])
            target = math.floor(size * scale)
        if target == size and scale == 1:
            continue
        at = _source(
            torch.arange(target, dtype=torch.float64),
            size,
            target,
            scale,
            coordinate_transformation_mode,
        )
        x = _nearest(x, dim, at, nearest_mode) if mode == "nearest" else _linear(x, dim, at)
    return x


def _source(at: Tensor, size: int, target: int, scale: float, transformation: str) -> Tensor:
    """Where in the input each output coordinate of an axis lies."""
    if transformation == "half_pixel" or (transformation == "pytorch_half_pixel" and target > 1):
        return (at + 0.5) / scale - 0.5
    if transformation == "asymmetric":
        return at / scale
    if transformation == "align_corners":
        return at * ((size - 1) / max(target - 1, 1))
    if transformation == "pytorch_half_pixel":
        return torch.zeros_like(at)
    raise UnsupportedError(f"Resize with {transformation} is not supported")


def _nearest(x: Tensor, dim: int, at: Tensor, nearest_mode: str) -> Tensor:
    rounded = {
        "round_prefer_floor": lambda: (at - 0.5).ceil(),
        "round_prefer_ceil": lambda: (at + 0.5).floor(),
        "floor": at.floor,
        "ceil": at.ceil,
    }[nearest_mode]()
    return x.index_select(dim, rounded.clamp(0, x.shape[dim] - 1).long())


def _linear(x: Tensor, dim: int, at: Tensor) -> Tensor:
    at = at.clamp(0, x.shape[dim] - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=x.shape[dim] - 1)
    shape = [1] * x.dim()
    shape[dim] = -1
    share = (at - low).to(x.dtype).reshape(shape)
    return x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share


def _identity(x: Tensor) -> Tensor:
    return x


def _dropout(x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Tensor:
    return x


OPERATORS: Final[Mapping[str, Operator]] = {
    # Arithmetic and logic
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": torch.ceil,
    "Clip": _clip,
    "Cos": torch.cos,
    "Div": _div,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "IsInf": _is_inf,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Max": _max,
    "Mean": _mean,
    "Min": _min,
    "Mod": _mod,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": _pow,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Sum": _sum,
    "Where": torch.where,
    "Xor": torch.logical_xor,
    # Activations
    "Elu": _elu,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": _log_softmax,
    "Mish": functional.mish,
    "PRelu": _prelu,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Softmax": _softmax,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Tanh": torch.tanh,
    # Reductions
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumSum": _cumsum,
    "ReduceL1": _reduce(lambda x, dims, keep: x.abs().sum(dims, keep, dtype=x.dtype)),
    "ReduceL2": _reduce(lambda x, dims, keep: x.square().sum(dims, keep, dtype=x.dtype).sqrt()),
    "ReduceLogSumExp": _reduce(lambda x, dims, keep: x.logsumexp(dims, keep)),
    "ReduceMax": _reduce(lambda x, dims, keep: x.amax(dims, keep)),
    "ReduceMean": _reduce(lambda x, dims, keep: x.mean(dims, keep)),
    "ReduceMin": _reduce(lambda x, dims, keep: x.amin(dims, keep)),
    "ReduceProd": _reduce(_prod),
    "ReduceSum": _reduce(lambda x, dims, keep: x.sum(dims, keep, dtype=x.dtype)),
    "ReduceSumSquare": _reduce(lambda x, dims, keep: x.square().sum(dims, keep, dtype=x.dtype)),
    "TopK": _top_k,
    # Shapes
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _identity,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    # Products and norms
    "BatchNormalization": _batch_norm,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_normalization,
    "MatMul": torch.matmul,
    "RMSNormalization": _rms_norm,
    # Attention
    "Attention": _attention,
    "RotaryEmbedding": _rotary_embedding,
    # Quantization
    "DequantizeLinear": _dequantize_linear,
    "QuantizeLinear": _quantize_linear,
    # Convolutions, pools and resizing
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "MaxPool": _max_pool,
    "Resize": _resize,
}
"""The function of every operator of ONNX's own domain that is known, as of opset 23."""
