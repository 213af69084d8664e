"""ONNX operators in Relax: one small function an operator.

Integers that describe shapes (``Shape`` and what is computed from it) never become tensors: they
are followed while the program is built, as tuples of numbers and symbolic dimensions. That keeps
``Reshape``, ``Expand``, ``Range`` and ``Slice`` symbolic. Operators without a function here go to
the converters of TVM's ONNX importer, one at a time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import onnx_ir as ir
import tvm
import tvm.sym
from tvm import relax, te, tirx, topi
from tvm.relax.frontend.onnx import onnx_frontend

from mxcompile import graph
from mxcompile.errors import UnsupportedError

Dim: TypeAlias = Any
"""An int or a TIR expression over symbolic dimensions."""
Dims: TypeAlias = tuple[Dim, ...]
Expr: TypeAlias = Any
"""A Relax expression."""

INJECTIVE: Final = 2
"""What TVM's fusion calls operators that compute each number from one of each operand."""

MAX_SHAPE_CONSTANT: Final = 64
"""Integer constants with more numbers than this are tables, not shapes."""


@dataclass
class Scope:
    """The Relax program under construction: where each ONNX value stands so far."""

    bb: Any
    """The ``relax.BlockBuilder``."""
    tensors: dict[ir.Value, Expr] = field(default_factory=dict)
    dims: dict[ir.Value, Dims] = field(default_factory=dict)
    symbols: dict[str, Any] = field(default_factory=dict)
    analyzer: Any = field(default_factory=tvm.sym.Analyzer)

    def emit(self, expr: Expr) -> Expr:
        """Bind an expression to a variable of the program."""
        return self.bb.emit(expr)

    def symbol(self, name: str) -> Any:
        """The symbolic dimension of that name."""
        return self.symbols.setdefault(name, tirx.Var(name, "int64"))

    def tensor(self, value: ir.Value | None) -> Expr:
        """The Relax tensor of an ONNX value; small constants are made here."""
        assert value is not None
        if value in self.tensors:
            return self.tensors[value]
        if value in self.dims:
            return self._from_dims(value)
        if value.const_value is None:
            raise UnsupportedError(f"the value {value.name} is not a tensor")
        return relax.const(value.const_value.numpy())

    def _from_dims(self, value: ir.Value) -> Expr:
        numbers = self.dims[value]
        if all(isinstance(d, int) for d in numbers):
            data = np.array(numbers, np.int64)
            scalar = value.shape is not None and len(value.shape) == 0
            return relax.const(data.reshape(()) if scalar else data)
        shape = relax.ShapeExpr(
            [tirx.IntImm("int64", d) if isinstance(d, int) else d for d in numbers]
        )
        vector = self.emit(relax.op.shape_to_tensor(shape))
        if value.shape is not None and len(value.shape) == 0:
            return self.emit(relax.op.reshape(vector, ()))
        return vector

    def known(self, value: ir.Value | None) -> Dims | None:
        """The integers of a value that are known while building, as a flat tuple."""
        if value is None:
            return None
        if value in self.dims:
            return self.dims[value]
        data = value.const_value
        if data is None or data.dtype not in _INTEGERS or data.size > MAX_SHAPE_CONSTANT:
            return None
        return tuple(int(n) for n in data.numpy().reshape(-1))

    def shape(self, value: ir.Value | None) -> Dims:
        """The shape of a tensor, static dimensions as ints."""
        return shape_of(self.tensor(value))

    def simplify(self, dim: Dim) -> Dim:
        """The shortest form of a dimension that the analyzer finds."""
        return dim if isinstance(dim, int) else _plain(self.analyzer.simplify(dim))


_INTEGERS: Final = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
_DTYPES: Final[Mapping[ir.DataType, str]] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.BOOL: "bool",
}


def dtype_name(dtype: ir.DataType | None) -> str:
    """TVM's name of a tensor type.

    Raises:
        UnsupportedError: the compiled program has no such type.
    """
    if dtype is None or dtype not in _DTYPES:
        raise UnsupportedError(f"tensors of type {dtype} are not supported in a compiled program")
    return _DTYPES[dtype]


def _plain(dim: Dim) -> Dim:
    return int(dim) if isinstance(dim, tirx.IntImm | int) else dim


def shape_of(tensor: Expr) -> Dims:
    """The shape of a Relax tensor, static dimensions as ints."""
    return tuple(_plain(d) for d in tensor.ty.shape)


Lower: TypeAlias = Callable[[Scope, ir.Node], Expr]


def _simple(function: Callable[..., Expr]) -> Lower:
    """An operator whose Relax twin takes the same tensors in the same order."""
    return lambda scope, node: function(*(scope.tensor(v) for v in node.inputs if v is not None))


def _fold(function: Callable[[Expr, Expr], Expr]) -> Lower:
    """A variadic operator as a chain of a binary one."""

    def lower(scope: Scope, node: ir.Node) -> Expr:
        first, *rest = (scope.tensor(v) for v in node.inputs)
        for other in rest:
            first = function(first, other)
        return first

    return lower


def _axis(node: ir.Node, rank: int, default: int) -> int:
    return int(node.attributes.get_int("axis", default) or 0) % rank


def _axes(scope: Scope, node: ir.Node, rank: int) -> list[int]:
    """The axes of a reduction: an attribute in old operators, the second input in newer ones."""
    given = scope.known(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    axes = given if given is not None else node.attributes.get_ints("axes", tuple(range(rank)))
    return [int(a) % rank for a in axes or ()]


_CHEAP: Final = ("Cast", "Mul", "Unsqueeze")
"""Operators that are computed again rather than stored between two kernels."""


def _by_itself(function: Callable[[Expr], Expr]) -> Lower:
    """An operator that computes its operand anew, so that no other reader keeps TVM from fusing.

    Rotary angles are read by a cosine and a sine: kernels for these, and none for the angles.
    """

    def lower(scope: Scope, node: ir.Node) -> Expr:
        _compute_again(scope, node.inputs[0])
        return function(scope.tensor(node.inputs[0]))

    return lower


def _compute_again(scope: Scope, value: ir.Value | None) -> None:
    node = value.producer() if value is not None else None
    if value in scope.tensors and node is not None and node.op_type in _CHEAP and not node.domain:
        for operand in dict.fromkeys(node.inputs):
            _compute_again(scope, operand)
        scope.tensors[value] = scope.emit(OPERATORS[node.op_type](scope, node))


def _reduce(function: Callable[..., Expr]) -> Lower:
    def lower(scope: Scope, node: ir.Node) -> Expr:
        x = scope.tensor(node.inputs[0])
        axes = _axes(scope, node, len(shape_of(x)))
        return function(x, axes, bool(node.attributes.get_int("keepdims", 1)))

    return lower


def _cast(scope: Scope, node: ir.Node) -> Expr:
    return relax.op.astype(
        scope.tensor(node.inputs[0]), dtype_name(ir.DataType(node.attributes["to"].as_int()))
    )


def _reshape(scope: Scope, node: ir.Node) -> Expr:
    """Reshape to dimensions that are known; 0 copies one and -1 takes what is left."""
    x, target = scope.tensor(node.inputs[0]), scope.known(node.inputs[1])
    if target is None:
        raise UnsupportedError(f"{graph.describe(node)}: its shape depends on data")
    return relax.op.reshape(x, resolve_reshape(scope, shape_of(x), target))


def resolve_reshape(scope: Scope, source: Dims, target: Dims) -> Dims:
    """The dimensions that ``target`` means for a tensor of shape ``source``."""
    wanted = [source[i] if _is(d, 0) else d for i, d in enumerate(target)]
    if any(_is(d, -1) for d in wanted):
        hole = next(i for i, d in enumerate(wanted) if _is(d, -1))
        wanted[hole] = _quotient(scope, source, tuple(d for i, d in enumerate(wanted) if i != hole))
    return tuple(wanted)


def _quotient(scope: Scope, source: Dims, given: Dims) -> Dim:
    """The product of ``source`` over that of ``given``, common symbolic factors cancelled first."""
    left = list(source)
    denominator: list[Dim] = []
    for dim in given:
        same = next((i for i, d in enumerate(left) if _same(scope, d, dim)), None)
        if same is None:
            denominator.append(dim)
        else:
            del left[same]
    top, bottom = math.prod(left), math.prod(denominator)
    if isinstance(top, int) and isinstance(bottom, int):
        return top // max(bottom, 1)
    return scope.simplify(tirx.floordiv(top, bottom)) if not _is(bottom, 1) else top


def _is(dim: Dim, number: int) -> bool:
    return isinstance(dim, int) and dim == number


def _same(scope: Scope, left: Dim, right: Dim) -> bool:
    if isinstance(left, int) or isinstance(right, int):
        return isinstance(left, int) and isinstance(right, int) and left == right
    return bool(scope.analyzer.can_prove_equal(left, right))


def _transpose(scope: Scope, node: ir.Node) -> Expr:
    perm = node.attributes.get_ints("perm")
    return relax.op.permute_dims(scope.tensor(node.inputs[0]), list(perm) if perm else None)


def _concat(scope: Scope, node: ir.Node) -> Expr:
    tensors = [scope.tensor(v) for v in node.inputs]
    return relax.op.concat(tensors, _axis(node, len(shape_of(tensors[0])), 0))


def _expand(scope: Scope, node: ir.Node) -> Expr:
    x, target = scope.tensor(node.inputs[0]), scope.known(node.inputs[1])
    if target is None:
        raise UnsupportedError(f"{graph.describe(node)}: its shape depends on data")
    return relax.op.broadcast_to(x, _broadcast(shape_of(x), target))


def _broadcast(left: Dims, right: Dims) -> Dims:
    rank = max(len(left), len(right))
    padded = [(1,) * (rank - len(s)) + s for s in (left, right)]
    return tuple(b if _is(a, 1) else a for a, b in zip(*padded, strict=True))


def _squeeze(scope: Scope, node: ir.Node) -> Expr:
    x = scope.tensor(node.inputs[0])
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return relax.op.squeeze(x)
    return relax.op.squeeze(x, _axes(scope, node, len(shape_of(x))))


def _unsqueeze(scope: Scope, node: ir.Node) -> Expr:
    x, axes = scope.tensor(node.inputs[0]), scope.known(node.inputs[1])
    assert axes is not None
    rank = len(shape_of(x)) + len(axes)
    return relax.op.expand_dims(x, sorted(int(a) % rank for a in axes))


def _slice(scope: Scope, node: ir.Node) -> Expr:
    x = scope.tensor(node.inputs[0])
    shape = shape_of(x)
    given = [scope.known(v) if v is not None else None for v in node.inputs[1:]]
    starts, ends, axes, steps = given + [None] * (4 - len(given))
    if starts is None or ends is None:
        raise UnsupportedError(f"{graph.describe(node)}: its bounds depend on data")
    axes = tuple(int(a) % len(shape) for a in axes) if axes else tuple(range(len(starts)))
    steps = steps or (1,) * len(starts)
    bounds = [
        (_clamp(shape[a], s), _clamp(shape[a], e))
        for a, s, e in zip(axes, starts, ends, strict=True)
    ]
    return relax.op.strided_slice(
        x, list(axes), [b[0] for b in bounds], [b[1] for b in bounds], list(steps)
    )


def _clamp(size: Dim, bound: Dim) -> Dim:
    """A slice bound in range: ONNX counts from the end below zero and writes huge ends."""
    if not isinstance(bound, int):
        return bound
    if isinstance(size, int):
        return min(max(bound + size if bound < 0 else bound, 0), size)
    return size + bound if bound < 0 else size if bound >= 2**31 - 1 else bound


def _split(scope: Scope, node: ir.Node) -> Expr:
    x = scope.tensor(node.inputs[0])
    axis = _axis(node, len(shape_of(x)), 0)
    sizes = scope.known(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is None:
        return relax.op.split(x, len(node.outputs), axis)
    return relax.op.split(x, list(np.cumsum(sizes[:-1]).tolist()), axis)


def _gather(scope: Scope, node: ir.Node) -> Expr:
    """A gather that fuses with its neighbours: TVM holds places that are read to be opaque."""
    data, index = (scope.tensor(value) for value in node.inputs)
    axis, attributes = _axis(node, len(shape_of(data)), 0), {"op_pattern": INJECTIVE}
    if _is(shape_of(data)[axis], 1) and shape_of(index) == (1,):
        return data  # the only place that there is
    if _lies_within(node.inputs[1], shape_of(data)[axis]):
        return scope.bb.call_te(take, data, index, axis, primfunc_attrs=attributes)
    return scope.bb.call_te(topi.take, data, index, axis, mode="clip", primfunc_attrs=attributes)


def take(data: te.Tensor, index: te.Tensor, axis: int) -> te.Tensor:
    """Numbers of ``data`` at places that all lie within: what topi prints a warning for."""
    end = axis + len(index.shape)

    def number(*at: tirx.Var) -> Expr:
        return data(*at[:axis], index(*at[axis:end]), *at[end:])

    shape = (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])
    return te.compute(shape, number, name="take")


def _lies_within(index: ir.Value | None, size: Dim) -> bool:
    """Whether an index is a constant, perhaps of another type, that needs no bounds."""
    while index is not None and (node := index.producer()) is not None and node.op_type == "Cast":
        index = node.inputs[0]
    if index is None or index.const_value is None or not isinstance(size, int):
        return False
    places = index.const_value.numpy()
    return bool(places.size and places.min() >= 0 and places.max() < size)


def _range(scope: Scope, node: ir.Node) -> Expr:
    bounds = [scope.known(v) for v in node.inputs]
    if any(b is None for b in bounds):
        raise UnsupportedError(f"{graph.describe(node)}: its bounds depend on data")
    start, end, step = (b[0] for b in bounds if b is not None)
    return relax.op.arange(start, end, step, dtype_name(node.outputs[0].dtype))


def _gelu(scope: Scope, node: ir.Node) -> Expr:
    tanh = node.attributes.get_string("approximate", "none") == "tanh"
    return (relax.op.nn.gelu_tanh if tanh else relax.op.nn.gelu)(scope.tensor(node.inputs[0]))


def _softmax(scope: Scope, node: ir.Node) -> Expr:
    return relax.op.nn.softmax(scope.tensor(node.inputs[0]), node.attributes.get_int("axis", -1))


def _where(scope: Scope, node: ir.Node) -> Expr:
    return relax.op.where(*(scope.tensor(v) for v in node.inputs))


def _flatten(scope: Scope, node: ir.Node) -> Expr:
    x = scope.tensor(node.inputs[0])
    shape = shape_of(x)
    axis = _axis(node, len(shape) + 1, 1)
    return relax.op.reshape(x, (math.prod(shape[:axis]), math.prod(shape[axis:])))


def _constant_of_shape(scope: Scope, node: ir.Node) -> Expr:
    shape = scope.known(node.inputs[0])
    if shape is None:
        raise UnsupportedError(f"{graph.describe(node)}: its shape depends on data")
    value = node.attributes.get_tensor("value")
    data = value.numpy().reshape(()) if value is not None else np.zeros((), np.float32)
    return relax.op.full(shape, relax.const(data), str(data.dtype))


def _constant(scope: Scope, node: ir.Node) -> Expr:
    value = next(iter(node.attributes.values()))
    data = value.as_tensor().numpy() if value.type == ir.AttributeType.TENSOR else value.value
    floats = (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)
    return relax.const(np.asarray(data, np.float32 if value.type in floats else None))


def _binary(op: str) -> Lower:
    return _simple(getattr(relax.op, op))


OPERATORS: Final[Mapping[str, Lower]] = {
    **{
        onnx: _binary(name)
        for onnx, name in {
            "Abs": "abs", "Add": "add", "And": "logical_and", "Ceil": "ceil",
            "Div": "divide", "Equal": "equal", "Erf": "erf", "Exp": "exp", "Floor": "floor",
            "Greater": "greater", "GreaterOrEqual": "greater_equal", "Less": "less",
            "LessOrEqual": "less_equal", "Log": "log", "Mul": "multiply", "Neg": "negative",
            "Not": "logical_not", "Or": "logical_or", "Pow": "power", "Round": "round",
            "Sigmoid": "sigmoid", "Sqrt": "sqrt", "Sub": "subtract", "Tanh": "tanh",
            "MatMul": "matmul",
        }.items()
    },
    "Identity": _simple(lambda x: x),
    "Relu": _simple(relax.op.nn.relu),
    "Reciprocal": _simple(lambda x: relax.op.divide(relax.const(1.0, "float32"), x)),
    "Max": _fold(relax.op.maximum),
    "Min": _fold(relax.op.minimum),
    "Sum": _fold(relax.op.add),
    "ReduceMax": _reduce(relax.op.max),
    "ReduceMin": _reduce(relax.op.min),
    "ReduceMean": _reduce(relax.op.mean),
    "ReduceSum": _reduce(relax.op.sum),
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _by_itself(relax.op.cos),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Range": _range,
    "Reshape": _reshape,
    "Sin": _by_itself(relax.op.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}  # fmt: skip


def follow_integers(scope: Scope, node: ir.Node) -> Dims | None:
    """The result of a node over integers that are known while building, or None."""
    if node.op_type == "Shape":
        shape = scope.shape(node.inputs[0])
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
        return shape[start:end]
    if node.op_type == "Size":
        return (math.prod(scope.shape(node.inputs[0])),)
    rule = _INTEGER_RULES.get(node.op_type)
    if rule is None or node.outputs[0].dtype not in _INTEGERS:
        return None
    inputs = [scope.known(v) for v in node.inputs]
    return (
        None
        if any(i is None for i in inputs)
        else rule(node, *[i for i in inputs if i is not None])
    )


def _elementwise(function: Callable[[Dim, Dim], Dim]) -> Callable[..., Dims]:
    def rule(_node: ir.Node, left: Dims, right: Dims) -> Dims:
        count = max(len(left), len(right))
        wide = [x * count if len(x) == 1 else x for x in (left, right)]
        return tuple(_plain(function(a, b)) for a, b in zip(*wide, strict=True))

    return rule


def _floordiv(left: Dim, right: Dim) -> Dim:
    return (
        left // right
        if isinstance(left, int) and isinstance(right, int)
        else tirx.floordiv(left, right)
    )


def _slice_integers(_node: ir.Node, data: Dims, starts: Dims, ends: Dims, *rest: Dims) -> Dims:
    step = rest[1][0] if len(rest) > 1 else 1
    return data[starts[0] : ends[0] : step]


_INTEGER_RULES: Final[Mapping[str, Callable[..., Dims]]] = {
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _elementwise(_floordiv),
    "Cast": lambda _node, x: x,
    "Identity": lambda _node, x: x,
    "Squeeze": lambda _node, x, *_: x,
    "Unsqueeze": lambda _node, x, *_: x,
    "Reshape": lambda _node, x, *_: x,
    "Concat": lambda _node, *parts: tuple(d for part in parts for d in part),
    "Gather": lambda _node, data, index: tuple(data[i] for i in index),
    "Slice": _slice_integers,
}


def imported(scope: Scope, node: ir.Node) -> Expr:
    """Lower an operator with the converter of TVM's ONNX importer.

    Raises:
        UnsupportedError: there is no converter, or it declines.
    """
    converters = onnx_frontend._get_convert_map()
    if node.domain or node.op_type not in converters:
        raise UnsupportedError(
            f"{graph.describe(node)} is not supported; remove the operator or replace it by others"
        )
    convert = converters[node.op_type].get_converter(graph.OPSET)
    attributes = {
        a.name: a.value.encode() if a.type == ir.AttributeType.STRING else a.value
        for a in node.attributes.values()
    }
    inputs = [None if v is None or v.name == "" else scope.tensor(v) for v in node.inputs]
    try:
        return convert(scope.bb, onnx_frontend.onnx_input(inputs), attributes, [{}, {}])
    except Exception as error:  # converters raise whatever they like, TVM's own errors included
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UnsupportedError(f"{graph.describe(node)} cannot be lowered: {reason}") from error
