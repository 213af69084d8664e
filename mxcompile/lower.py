"""From the fused ONNX graph to a Relax module, its packed weights, and machine code.

The program is one function ``main(*inputs, [caches], weights)``. Weights are inputs, packed for the
target's kernels; caches are inputs that attention updates in place. Fused operators become calls of
kernel templates, everything else Relax operators that TVM fuses and our schedule vectorises.

A decoder for a GPU has a second function, ``decode``: ``main`` for one token of one sequence, with
the same weights and kernels. Only the capacity of the caches is free in it, so that its kernels
launch as one CUDA graph (``targets.cuda_graph``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, s_tir, tirx

from mxcompile import graph, linker, qdq
from mxcompile.artifact import DECODE, MAIN, TensorSpec
from mxcompile.errors import MxError, UnsupportedError
from mxcompile.formats import CACHE_FORMATS, FORMATS, ActivationFormat
from mxcompile.knobs import Choice
from mxcompile.passes.fuse_gate import GATE
from mxcompile.passes.fuse_residual import RESIDUAL_NORM, epsilon, rounded_format
from mxcompile.passes.fuse_rotary import ROTARY_ATTENTION
from mxcompile.passes.kv_cache import NO_WINDOW
from mxcompile.passes.quantize_activations import activation_format
from mxcompile.pipeline import Context
from mxcompile.relax_ops import (
    OPERATORS,
    Dims,
    Expr,
    Scope,
    dtype_name,
    follow_integers,
    imported,
    resolve_reshape,
    shape_of,
)
from mxcompile.target import Target
from mxcompile.targets import cpu_attention, cpu_matmul, cpu_norm, cuda_graph, packing
from mxcompile.targets import kernels as families

MAX_INLINE: Final = 64
"""Integers of a tensor that becomes part of the code; more go to the weight file."""

SMALL: Final = 8
"""Constants of up to so many numbers (scales, exponents) go into the code, not the weight file."""

CACHES: Final = "cache."
"""Inputs of this prefix are caches: they go into one tuple and are updated in place."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """A Relax module and what it takes: plain inputs, cache tensors, weights in order."""

    module: Any
    inputs: tuple[TensorSpec, ...]
    caches: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class _View:
    """A value that is a range of columns of a wider tensor, not a tensor of its own.

    With ``parts`` that are not 0 the range counts as split: [..., parts, width / parts].
    """

    wide: Expr
    columns: cpu_norm.Columns
    width: int
    parts: int = 0

    @property
    def shape(self) -> Dims:
        """The shape of the value that this stands for."""
        lead = shape_of(self.wide)[:-1]
        return (*lead, self.parts, self.width // self.parts) if self.parts else (*lead, self.width)


@dataclass
class _Builder:
    """State of one lowering."""

    model: ir.Model
    kernels: families.Kernels
    scope: Scope
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    weight_vars: dict[str, Expr] = field(default_factory=dict)
    packed: dict[tuple[str, ...], str] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)
    views: dict[ir.Value, _View] = field(default_factory=dict)
    rounded: dict[ir.Value | None, tuple[Expr, Dims, int]] = field(default_factory=dict)
    unrounded: dict[ir.Value | None, "_Unrounded"] = field(default_factory=dict)
    made: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    choice: Choice = field(default_factory=Choice)

    def another(self, dims: Mapping[str, int]) -> "_Builder":
        """For another function of the module, with the same weights and kernels; fixes dims."""
        scope = Scope(self.scope.bb, symbols=dict(dims))
        return replace(self, scope=scope, weight_vars={}, views={}, rounded={}, unrounded={})

    @property
    def matmul(self) -> families.MatmulTemplates:
        """The matrix product kernels, with code for the formats that weights have."""
        return self.kernels.matmul.only(tuple(f for f in FORMATS if f in self.formats))

    def kernel(self, template: Callable[..., Any], *knobs: Any) -> Any:
        """What a kernel template makes of its knobs: a function, made once, or None."""
        method: Any = template  # of a frozen dataclass: what is equal makes the same function
        key = (method.__func__, method.__self__, knobs)
        if key not in self.made:
            function = template(*knobs)
            self.made[key] = function and self.scope.bb.add_func(
                rooted(function), template.__name__
            )
        return self.made[key]

    def call(self, kernel: Any, args: Sequence[Expr], shape: Dims, dtype: str = "float32") -> Expr:
        """Call a kernel that writes one new tensor."""
        return self.scope.emit(relax.call_tir(kernel, list(args), relax.TensorType(shape, dtype)))

    def tensor(self, value: ir.Value | None) -> Expr:
        """The tensor of a value; a view is copied out of its wide tensor here."""
        if value in self.views:
            view = self.views[value]
            rank = len(shape_of(view.wide))
            start = view.columns.offset
            copy = self.scope.emit(
                relax.op.strided_slice(view.wide, [rank - 1], [start], [start + view.width])
            )
            if view.parts:
                copy = self.scope.emit(relax.op.reshape(copy, view.shape))
            self.scope.tensors[value] = copy
            del self.views[value]
        return self.scope.tensor(value)

    def source(self, value: ir.Value | None) -> tuple[Expr, cpu_norm.Columns]:
        """A [batch, seq, columns] value as columns of a tensor; mostly they are all of it."""
        if value in self.views:
            return self.views[value].wide, self.views[value].columns
        tensor = self.scope.tensor(value)
        return tensor, cpu_norm.Columns(int(shape_of(tensor)[-1]))

    def view(self, value: ir.Value | None) -> _View | None:
        """The view that stands for a value, if one does."""
        return self.views.get(value) if value is not None else None

    def constant(self, value: ir.Value | None) -> Expr:
        """The tensor of a constant that a kernel reads."""
        assert value is not None
        name = graph.name(value)
        return self.weight_vars[name] if name in self.weight_vars else self.scope.tensor(value)


def rooted(function: Any) -> Any:
    """A kernel with a root block, which Relax looks for in every function that it calls."""
    if not isinstance(function.body, s_tir.SBlockRealize):
        root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", function.body))
        function = function.with_body(root)
    return function.without_attr("global_symbol").with_attr("tirx.is_scheduled", True)


def lower(model: ir.Model, ctx: Context, choice: Choice | None = None) -> Lowered:
    """Build the Relax module of a fused model.

    Args:
        model: The output of ``passes.FUSE``.
        ctx: The target.
        choice: The knobs of the matmul kernels, if any are known to be better than the defaults.

    Raises:
        UnsupportedError: a node has no lowering; the text names it.
    """
    kernels, scope = families.of(ctx.target), Scope(relax.BlockBuilder())
    builder = _Builder(model, kernels, scope, choice=choice or Choice())
    _collect_weights(builder)
    specs = [_spec(v) for v in model.graph.inputs]
    caches = tuple(s for s in specs if s.name.startswith(CACHES))
    inputs = tuple(s for s in specs if s not in caches)
    _function(builder, MAIN)
    if kernels.graphs and caches:
        one = {dim: 1 for spec in inputs for dim in spec.shape if isinstance(dim, str)}
        _function(builder.another(one), DECODE, cuda_graph.INPUTS_STAY)
    outputs = tuple(_spec(v) for v in _outputs(model))
    return Lowered(scope.bb.finalize(), inputs, caches, outputs, builder.weights)


def _outputs(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.outputs if not graph.name(v).startswith(CACHES)]


def _function(builder: _Builder, name: str, attrs: Mapping[str, int] | None = None) -> None:
    """Add the whole graph as a function of that name."""
    model, scope = builder.model, builder.scope
    inputs = {v: relax.Var(s.name, _type(scope, s)) for v in model.graph.inputs for s in [_spec(v)]}
    cached = [v for v in inputs if graph.name(v).startswith(CACHES)]
    plain = [var for value, var in inputs.items() if value not in cached]
    caches = relax.Var("caches", relax.TupleType([inputs[v].ty for v in cached]))
    # As a tuple, each of its hundreds of tensors would be checked in every call; kernels check too.
    weights = relax.Var("weights", relax.AnyType())
    params = [*plain, *([caches] if cached else []), weights]
    with scope.bb.function(name, params, attrs=attrs):
        with scope.bb.dataflow():
            for index, (label, array) in enumerate(builder.weights.items()):
                builder.weight_vars[label] = scope.emit(
                    relax.call_pure_packed(
                        "ffi.ArrayGetItem",  # not "vm.builtin", which ends what a graph captures
                        weights,
                        tirx.IntImm("int64", index),
                        ty_args=relax.TensorType(array.shape, str(array.dtype)),
                    )
                )
            for value, var in inputs.items():
                at = cached.index(value) if value in cached else None
                scope.tensors[value] = (
                    var if at is None else scope.emit(relax.TupleGetItem(caches, at))
                )
            for node in model.graph:
                _lower_node(builder, node)
            results = [builder.tensor(v) for v in _outputs(model)]
            result = scope.bb.emit_output(results[0] if len(results) == 1 else relax.Tuple(results))
        scope.bb.emit_func_output(result)


def _spec(value: ir.Value) -> TensorSpec:
    if value.shape is None:
        raise UnsupportedError(f"{value.name} has no known rank")
    shape = tuple(
        d if isinstance(d, int) else str(d.value or f"dim{i}") for i, d in enumerate(value.shape)
    )
    return TensorSpec(graph.name(value), dtype_name(value.dtype), shape)


def _type(scope: Scope, spec: TensorSpec) -> Any:
    dims = [scope.symbol(d) if isinstance(d, str) else d for d in spec.shape]
    return relax.TensorType(dims, spec.dtype)


def _collect_weights(builder: _Builder) -> None:
    """Pack the weights of fused operators; float tables that other nodes read stay as they are."""
    for node in builder.model.graph:
        if node.domain == graph.DOMAIN and node.op_type.startswith("Mixed"):
            _pack(builder, node)
            continue
        for value in node.inputs:
            if value is None or value.const_value is None or value.const_value.size <= SMALL:
                continue
            if value.dtype == ir.DataType.FLOAT or value.const_value.size > MAX_INLINE:
                builder.weights.setdefault(graph.name(value), graph.array(value))


def _pack(builder: _Builder, node: ir.Node) -> None:
    names, _ = _names_and_rows(builder.model, node)
    if names in builder.packed:
        return
    chains, actual = _weight_chains(builder.model, node)
    weights = [qdq.read(chain, actual) for chain in chains]
    parts = [
        packing.pack(w.values.codes, w.values.scales, w.values.zeros, w.values.row_scale, w.formats)
        for w in weights
    ]
    packed = parts[0] if len(parts) == 1 else packing.concat(parts)
    label = "+".join(names)
    builder.weights[f"{label}.packed"] = packed.data
    builder.weights[f"{label}.tiles"] = packed.table
    builder.formats.update(fmt.name for w in weights for fmt in set(w.formats.formats))
    builder.packed[names] = label


def body_of(model: ir.Model, node: ir.Node) -> ir.Function:
    """The function that a fused node calls."""
    return model.functions[node.op_identifier()]


def _weight_chains(model: ir.Model, node: ir.Node) -> tuple[list[list[ir.Node]], qdq.Actual]:
    """How a fused operator dequantizes its weights, in the order of its outputs."""
    function = body_of(model, node)
    pairs = zip(function.inputs, node.inputs, strict=True)
    actual = {inner: outer for inner, outer in pairs if outer is not None}
    slot = 0 if node.op_type == "MixedGather" else 1
    readers = [v.producer() for v in function.outputs]
    weights = [n.inputs[slot] for n in readers if n is not None]
    chains = [qdq.chain(w, actual) for w in weights if w is not None]
    return [c for c in chains if c is not None], actual


def _lower_node(builder: _Builder, node: ir.Node) -> None:
    scope = builder.scope
    if node.domain == "" and (numbers := follow_integers(scope, node)) is not None:
        scope.dims[node.outputs[0]] = numbers
        return
    fused = FUSED.get((node.domain, node.op_type))
    try:
        if fused is not None:
            results = fused(builder, node)
        else:
            for value in node.inputs:
                if value in builder.views:
                    builder.tensor(value)
            for value in node.inputs:
                if value is not None and value.name in builder.weight_vars:
                    scope.tensors[value] = builder.weight_vars[value.name]
            operator = OPERATORS.get(node.op_type) if node.domain == "" else None
            results = scope.emit((operator or imported)(scope, node))
    except MxError:
        raise
    except Exception as error:  # TVM raises its own errors when an operator's types do not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UnsupportedError(f"{graph.describe(node)} cannot be lowered: {reason}") from error
    _bind(builder, node, results)


def _bind(builder: _Builder, node: ir.Node, results: Any) -> None:
    outputs = [v for v in node.outputs if v.name]
    if isinstance(results, list | tuple):
        found = list(results)
    elif isinstance(results.ty, relax.TupleType):
        found = [
            builder.scope.emit(relax.TupleGetItem(results, i))
            for i in range(len(results.ty.fields))
        ]
    else:
        found = [results]
    for value, result in zip(outputs, found, strict=False):
        if isinstance(result, _View):
            builder.views[value] = result
        else:
            builder.scope.tensors[value] = result


def _rows(builder: _Builder, x: Expr) -> tuple[Expr, Dims, int]:
    """A tensor as a matrix [rows, columns], its leading dimensions, and its columns."""
    *lead, columns = shape_of(x)
    shape = resolve_reshape(builder.scope, tuple(shape_of(x)), (-1, columns))
    return builder.scope.emit(relax.op.reshape(x, shape)), tuple(lead), int(columns)


def _weight(builder: _Builder, names: tuple[str, ...]) -> list[Expr]:
    label = builder.packed[names]
    return [builder.weight_vars[f"{label}.packed"], builder.weight_vars[f"{label}.tiles"]]


def _product(
    builder: _Builder,
    x: Expr,
    weight: list[Expr],
    rows: int,
    activation: ActivationFormat | None = None,
) -> Expr:
    """The matrix product of a matrix, rounded to a format or as it is, with packed row tiles."""
    count, columns = shape_of(x)
    if activation is None:
        return builder.call(builder.kernel(builder.matmul.matmul_f32), [x, *weight], (count, rows))
    source = cpu_matmul.Rows(int(columns))
    if (
        _is_one(count)
        and builder.kernel(builder.matmul.matmul_rounded, source, activation) is not None
    ):
        row = builder.scope.emit(relax.op.reshape(x, (1, 1, columns)))
        unrounded = _Unrounded(source, [row], (1,), None)
        return _multiply_unrounded(builder, unrounded, weight, rows, activation)
    size = cpu_matmul.activation_bytes(int(columns), activation)
    quantize = builder.kernel(builder.matmul.quantize_activation, activation)
    codes = builder.call(quantize, [x], (count, size), "int8")
    return _multiply(builder, codes, int(columns), weight, rows, activation)


def _multiply(
    builder: _Builder,
    codes: Expr,
    columns: int,
    weight: list[Expr],
    rows: int,
    activation: ActivationFormat,
) -> Expr:
    """The product of a matrix of ``columns`` that is rounded already."""
    matmul = builder.choice.tuned(builder.matmul, rows, columns)
    multiply = builder.kernel(matmul.matmul_quantized, activation)
    return builder.call(multiply, [codes, *weight], (shape_of(codes)[0], rows))


@dataclass(frozen=True, slots=True)
class _Unrounded:
    """What makes a row that the product which reads it makes and rounds for itself.

    It writes a residual's sum as well, ``total``.
    """

    source: cpu_matmul.Source
    inputs: list[Expr]
    lead: Dims
    total: ir.Value | None


def _round_later(
    builder: _Builder,
    node: ir.Node,
    source: cpu_matmul.Source,
    fmt: ActivationFormat,
    inputs: list[Expr],
) -> bool:
    """Leave a node that makes and rounds a row to the product that alone reads it, if that can."""
    *totals, value = node.outputs
    lead = tuple(shape_of(inputs[0])[:-1])
    readers = list(value.consumers())
    if len(readers) != 1 or not all(map(_is_one, lead)):
        return False
    # Norms' weights are read before kernels have ended that might compute them.
    first = {"RMSNormalization": 1, RESIDUAL_NORM: 2}.get(node.op_type, len(node.inputs))
    if not _are_constant(node.inputs[first:]):
        return False
    # The sum is there once the product is: all else that reads it must come later.
    order = {n: i for i, n in enumerate(builder.model.graph)} if totals else {}
    others = [n for total in totals for n in total.consumers()]
    if any(order[n] < order[readers[0]] for n in others):
        return False
    if builder.kernel(builder.matmul.matmul_rounded, source, fmt) is None:
        return False
    builder.unrounded[value] = _Unrounded(source, inputs, lead, totals[0] if totals else None)
    return True


def _are_constant(values: Sequence[ir.Value | None]) -> bool:
    return all(v is not None and v.const_value is not None for v in values)


def _is_one(dim: Any) -> bool:
    return isinstance(dim, int) and dim == 1


def _multiply_unrounded(
    builder: _Builder,
    row: _Unrounded,
    weight: list[Expr],
    rows: int,
    activation: ActivationFormat,
) -> Expr:
    """The product of a row that is not made yet."""
    kernel = builder.kernel(builder.matmul.matmul_rounded, row.source, activation)
    arguments = [*row.inputs, *weight]
    if row.total is None:
        return builder.call(kernel, arguments, (1, rows))
    shapes = shape_of(row.inputs[0]), (1, rows)
    both = [relax.TensorType(shape, "float32") for shape in shapes]
    pair = builder.scope.emit(relax.call_tir(kernel, arguments, both))
    total, product = (builder.scope.emit(relax.TupleGetItem(pair, i)) for i in (0, 1))
    builder.scope.tensors[row.total] = total
    return product


def _mixed_linear(builder: _Builder, node: ir.Node) -> list[Any]:
    body = body_of(builder.model, node)
    names, sizes = _names_and_rows(builder.model, node)
    x, weight, activation = node.inputs[0], _weight(builder, names), activation_format(body)
    if x in builder.rounded:
        assert activation is not None
        codes, lead, columns = builder.rounded[x]
        product = _multiply(builder, codes, columns, weight, sum(sizes), activation)
    elif x in builder.unrounded:
        assert activation is not None
        row = builder.unrounded[x]
        product, lead = _multiply_unrounded(builder, row, weight, sum(sizes), activation), row.lead
    else:
        matrix, lead, _ = _rows(builder, builder.tensor(x))
        product = _product(builder, matrix, weight, sum(sizes), activation)
    wide = builder.scope.emit(relax.op.reshape(product, (*lead, sum(sizes))))
    if len(sizes) == 1:
        return [wide]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return [
        _View(wide, cpu_norm.Columns(sum(sizes), start), size)
        for start, size in zip(starts, sizes, strict=True)
    ]


def _names_and_rows(model: ir.Model, node: ir.Node) -> tuple[tuple[str, ...], list[int]]:
    """The units of a fused operator and their rows, without reading the weights."""
    chains, actual = _weight_chains(model, node)
    return (
        tuple(qdq.unit_of(c, actual) for c in chains),
        [qdq.rows_of(c, actual) for c in chains],
    )


def _mixed_gather(builder: _Builder, node: ir.Node) -> Expr:
    names, _ = _names_and_rows(builder.model, node)
    ids = builder.tensor(node.inputs[0])
    lead = shape_of(ids)
    flat = builder.scope.emit(relax.op.reshape(ids, resolve_reshape(builder.scope, lead, (-1,))))
    output = node.outputs[0].shape
    assert output is not None
    columns = int(output[-1])  # type: ignore[arg-type]
    kernel = builder.kernel(builder.matmul.gather_rows)
    rows = builder.call(kernel, [flat, *_weight(builder, names)], (shape_of(flat)[0], columns))
    return builder.scope.emit(relax.op.reshape(rows, (*lead, columns)))


def _mixed_conv(builder: _Builder, node: ir.Node) -> Expr:
    """A convolution as a matrix product over patches; [batch, channels, height, width].

    The patches of every output position become the rows of a matrix.
    """
    (inner,) = (n for n in body_of(builder.model, node) if n.op_type == "Conv")
    names, (outputs,) = _names_and_rows(builder.model, node)
    patches, batch, height, width = _patches(builder, inner, builder.tensor(node.inputs[0]))
    product = _product(builder, patches, _weight(builder, names), outputs)
    emit = builder.scope.emit
    image = emit(relax.op.reshape(product, (batch, height, width, outputs)))
    image = emit(relax.op.permute_dims(image, [0, 3, 1, 2]))
    if len(inner.inputs) > 2 and inner.inputs[2] is not None:
        actual = dict(zip(body_of(builder.model, node).inputs, node.inputs, strict=True))
        bias = graph.array(actual[inner.inputs[2]]).reshape(1, outputs, 1, 1)
        image = emit(relax.op.add(image, relax.const(bias)))
    return image


def _patches(builder: _Builder, conv: ir.Node, x: Expr) -> tuple[Expr, Any, Any, Any]:
    """The inputs of every output position as rows; the output's batch, height and width."""
    batch, channels, height, width = shape_of(x)
    weight = conv.inputs[1]
    assert weight is not None and weight.shape is not None
    kernel = [int(d) for d in weight.shape.numpy()[2:]]
    strides = list(conv.attributes.get_ints("strides") or (1, 1))
    dilations = list(conv.attributes.get_ints("dilations") or (1, 1))
    pads = _pads(conv, (height, width), kernel, strides, dilations)
    emit, simplify = builder.scope.emit, builder.scope.simplify
    if any(pads):
        x = emit(relax.op.nn.pad(x, [0, 0, 0, 0, pads[0], pads[2], pads[1], pads[3]]))
    size = [
        simplify((dim + low + high - dilation * (taps - 1) - 1) // stride + 1)
        for dim, low, high, dilation, taps, stride in zip(
            (height, width), pads[:2], pads[2:], dilations, kernel, strides, strict=True
        )
    ]
    taps = [
        emit(
            relax.op.strided_slice(
                x,
                [2, 3],
                [i * dilations[0], j * dilations[1]],
                [
                    i * dilations[0] + (size[0] - 1) * strides[0] + 1,
                    j * dilations[1] + (size[1] - 1) * strides[1] + 1,
                ],
                strides,
            )
        )
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    stacked = emit(relax.op.stack(taps, 2)) if len(taps) > 1 else taps[0]
    columns = channels * len(taps)
    flat = emit(relax.op.reshape(stacked, (batch, columns, size[0] * size[1])))
    rows = emit(relax.op.permute_dims(flat, [0, 2, 1]))
    return emit(relax.op.reshape(rows, (batch * size[0] * size[1], columns))), batch, *size


def _pads(
    conv: ir.Node, size: Dims, kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """The padding before and after each axis: as given, or what SAME means for a known size."""
    auto = conv.attributes.get_string("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        return list(conv.attributes.get_ints("pads") or (0, 0, 0, 0))
    spans = [(taps - 1) * dilation + 1 for taps, dilation in zip(kernel, dilations, strict=True)]
    total = []
    for dim, span, stride in zip(size, spans, strides, strict=True):
        if stride != 1 and not isinstance(dim, int):
            raise UnsupportedError(
                f"{graph.describe(conv)}: {auto} needs sizes that are known; fix them with --shape"
            )
        # With stride 1 the size does not matter.
        total.append(
            span - 1 if stride == 1 else max((-(-dim // stride) - 1) * stride + span - dim, 0)
        )
    low = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]
    return low + [t - before for t, before in zip(total, low, strict=True)]


def _linear(builder: _Builder, node: ir.Node) -> Expr:
    """A product with a float matrix, which is too small to be planned: transposed when packed."""
    weight = node.inputs[1]
    assert weight is not None
    return relax_matmul(builder, builder.tensor(node.inputs[0]), builder.constant(weight))


def relax_matmul(builder: _Builder, x: Expr, weight: Expr) -> Expr:
    """``x @ weight.T`` in Relax."""
    transposed = builder.scope.emit(relax.op.permute_dims(weight))
    return builder.scope.emit(relax.op.matmul(x, transposed))


def _reshape(builder: _Builder, node: ir.Node) -> Any:
    """Splitting the columns of a view into heads keeps it a view."""
    view, target = builder.view(node.inputs[0]), builder.scope.known(node.inputs[1])
    if view is None or view.parts or target is None:
        return builder.scope.emit(_plain_reshape(builder, node))
    shape = resolve_reshape(builder.scope, view.shape, target)
    rank = len(shape_of(view.wide))
    if len(shape) != rank + 1 or not isinstance(shape[-2], int):
        return builder.scope.emit(_plain_reshape(builder, node))
    return [_View(view.wide, view.columns, view.width, shape[-2])]


def _plain_reshape(builder: _Builder, node: ir.Node) -> Expr:
    builder.tensor(node.inputs[0])
    return OPERATORS["Reshape"](builder.scope, node)


def _norm(builder: _Builder, node: ir.Node) -> Any:
    """RMSNormalization or LayerNormalization over the last axis; heads of a view in place."""
    x = node.inputs[0]
    eps = epsilon(node)
    view = builder.view(x)
    if view is not None:
        wide, columns, shape = view.wide, view.columns, view.shape
        parts, size = max(view.parts, 1), shape[-1]
    else:
        wide = builder.tensor(x)
        shape = shape_of(wide)
        parts, size, columns = 1, int(shape[-1]), None
    if not graph.last_axis_only(node, len(shape)):
        raise UnsupportedError(f"{graph.describe(node)} normalizes more than the last axis")
    runs = cpu_norm.Runs(size, parts, len(shape_of(wide)), columns)
    out = (*shape_of(wide)[:-1], parts * size)
    scale = builder.constant(node.inputs[1])
    if node.op_type == "RMSNormalization":
        if view is None and _norm_and_round(builder, node, wide, scale, eps):
            return ()
        y = builder.call(
            builder.kernel(builder.kernels.norm.rms_norm, runs, eps), [wide, scale], out
        )
    else:
        zero = relax.const(np.zeros(size, np.float32))
        bias = builder.constant(node.inputs[2]) if len(node.inputs) > 2 else zero
        kernel = builder.kernel(builder.kernels.norm.layer_norm, runs, eps)
        y = builder.call(kernel, [wide, scale, bias], out)
    return builder.scope.emit(relax.op.reshape(y, shape)) if view is not None else y


def _norm_and_round(builder: _Builder, node: ir.Node, x: Expr, scale: Expr, eps: float) -> bool:
    """Round what a norm gives while it is in registers, if products alone read it."""
    (value,) = node.outputs
    fmt, shape = rounded_format(builder.model, value), shape_of(x)
    if fmt is None or len(shape) != 3:
        return False
    norm = cpu_matmul.Norm(int(shape[-1]), eps)
    if _round_later(builder, node, norm, fmt, [x, scale]):
        return True
    kernel = builder.kernel(builder.matmul.normalize_activation, norm, fmt)
    codes = builder.scope.emit(relax.call_tir(kernel, [x, scale], _rounded(builder, shape, fmt)))
    builder.rounded[value] = codes, tuple(shape[:-1]), int(shape[-1])
    return True


def _rounded(builder: _Builder, shape: Dims, fmt: ActivationFormat) -> Any:
    """The type of a value's rounded rows."""
    count = resolve_reshape(builder.scope, tuple(shape), (-1, shape[-1]))[0]
    return relax.TensorType((count, cpu_matmul.activation_bytes(int(shape[-1]), fmt)), "int8")


def _residual_norm(builder: _Builder, node: ir.Node) -> list[Any]:
    """A sum, and its norm for products; what is added may be normalized first."""
    attributes = node.attributes
    eps, inner_eps = float(attributes["epsilon"].as_float()), None
    if "inner_epsilon" in attributes:
        inner_eps = float(attributes["inner_epsilon"].as_float())
    rest, added = (builder.tensor(x) for x in node.inputs[:2])
    scales = [builder.constant(x) for x in node.inputs[2:]]
    total, value = node.outputs
    fmt, shape = rounded_format(builder.model, value), shape_of(rest)
    assert fmt is not None
    residual = cpu_matmul.Residual(int(shape[-1]), eps, inner_eps)
    if _round_later(builder, node, residual, fmt, [rest, added, *scales]):
        return []
    kernel = builder.kernel(builder.matmul.residual_activation, residual, fmt)
    both = [relax.TensorType(shape, "float32"), _rounded(builder, shape, fmt)]
    pair = builder.scope.emit(relax.call_tir(kernel, [rest, added, *scales], both))
    h, codes = (builder.scope.emit(relax.TupleGetItem(pair, i)) for i in (0, 1))
    builder.rounded[value] = codes, tuple(shape[:-1]), int(shape[-1])
    builder.scope.tensors[total] = h
    return []


def _gate(builder: _Builder, node: ir.Node) -> list[Any] | Expr:
    """``act(gate) * up``, rounded as it is computed."""
    (value,) = node.outputs
    fmt, emit = rounded_format(builder.model, value), builder.scope.emit
    assert fmt is not None
    (gate, gate_at), (up, up_at) = (builder.source(x) for x in node.inputs)
    size, lead = _width(value), shape_of(gate)[:-1]
    columns = cpu_matmul.Gate(node.overload, size, gate_at, up_at)  # type: ignore[arg-type]
    if _round_later(builder, node, columns, fmt, [gate, up]):
        return []
    kernel = builder.kernel(builder.matmul.gate_activation, columns, fmt)
    codes = emit(relax.call_tir(kernel, [gate, up], _rounded(builder, (*lead, size), fmt)))
    builder.rounded[value] = codes, tuple(lead), size
    return []


def _softmax(builder: _Builder, node: ir.Node) -> Expr:
    x = builder.tensor(node.inputs[0])
    shape = shape_of(x)
    if not graph.last_axis_only(node, len(shape)):
        return builder.scope.emit(OPERATORS["Softmax"](builder.scope, node))
    size = shape[-1] if isinstance(shape[-1], int) else 0
    kernel = builder.kernel(builder.kernels.norm.softmax, cpu_norm.Runs(size, 1, len(shape)))
    return builder.call(kernel, [x], shape)


def _rotary(builder: _Builder, node: ir.Node) -> Expr:
    """RotaryEmbedding on [batch, seq, heads * dim] with cosines and sines a position."""
    heads = int(node.attributes.get_int("num_heads", 0) or 0)
    if not heads or node.attributes.get_int("interleaved", 0) != 0 or len(node.inputs) > 3:
        raise UnsupportedError(f"{graph.describe(node)}: this form of it is not supported")
    x, columns = builder.source(node.inputs[0])
    dim = _width(node.inputs[0]) // heads
    rotated = int(node.attributes.get_int("rotary_embedding_dim", 0) or 0)
    angles = [builder.tensor(v) for v in node.inputs[1:3]]
    kernel = builder.kernel(builder.kernels.attention.rotary, heads, dim, rotated, columns)
    return builder.call(kernel, [x, *angles], (*shape_of(x)[:-1], heads * dim))


def _width(value: ir.Value | None) -> int:
    assert value is not None and value.shape is not None
    return int(value.shape[-1])  # type: ignore[arg-type]


def _cached_attention(builder: _Builder, node: ir.Node) -> list[Any]:
    """Append to the caches in place, then attend to them."""
    q, k, v = (builder.source(x) for x in node.inputs[:3])
    past, *parts = (builder.scope.tensor(x) for x in node.inputs[3:])
    attention, caches = _attention_of(node), _caches_of(node)
    kept = _appended(builder, attention, caches, k, v, past, parts)
    return [_attended(builder, attention, caches, q, past, kept), *kept]


def _rotary_attention(builder: _Builder, node: ir.Node) -> list[Any]:
    """Turn queries and keys, append to the caches in place, then attend to them."""
    attributes = node.attributes
    eps = float(attributes["epsilon"].as_float()) if "epsilon" in attributes else None
    rotation = cpu_attention.Rotation(attributes["rotary_embedding_dim"].as_int(), eps)
    q, k, v = (builder.source(x) for x in node.inputs[:3])
    angles = [builder.tensor(x) for x in node.inputs[3:5]]
    count = 0 if eps is None else 2
    weight_values = node.inputs[5 : 5 + count]
    weights = [builder.constant(x) for x in weight_values]
    past, *parts = (builder.scope.tensor(x) for x in node.inputs[5 + count :])
    attention, caches = _attention_of(node), _caches_of(node)
    placed = replace(attention, q=q[1], k=k[1], v=v[1])
    lead, templates = shape_of(q[0])[:-1], builder.kernels.attention
    flat = relax.TensorType((*lead, attention.heads * attention.dim), "float32")
    args = [q[0], k[0], v[0], *angles, *weights, past, *parts]
    written, types = [*range(len(args) - len(parts), len(args))], [p.ty for p in parts]
    if _is_one(lead[1]) and _are_constant(weight_values):
        kernel = builder.kernel(templates.attend_new, placed, caches, rotation)
        if kernel is not None:
            scratch = _scratch(builder, attention, lead[0])
            places, types = [*written, -1, *(-1 for _ in scratch)], [*types, flat, *scratch]
            found = _in_place(builder, kernel, args, places, types)
            return [found[len(parts)], *found[: len(parts)]]
    kernel = builder.kernel(templates.rotate, placed, caches, rotation)
    *kept, turned = _in_place(builder, kernel, args, [*written, -1], [*types, flat])
    return [_attended(builder, attention, caches, _all(turned), past, kept), *kept]


def _scratch(builder: _Builder, attention: cpu_attention.Attention, batch: Any) -> list[Any]:
    """The types of the tensors that attention works in."""
    shapes = builder.kernels.attention.scratch(attention)
    return [relax.TensorType((batch, *shape), "float32") for shape in shapes]


def _attention_of(node: ir.Node) -> cpu_attention.Attention:
    attributes = node.attributes
    heads, kv_heads = (int(attributes[n].as_int()) for n in ("num_heads", "kv_num_heads"))
    window = int(attributes["window"].as_int())
    return cpu_attention.Attention(
        heads,
        kv_heads,
        _width(node.inputs[0]) // heads,
        attributes["scale"].as_float(),
        window=0 if window == NO_WINDOW else window,
        softcap=attributes["softcap"].as_float(),
    )


def _caches_of(node: ir.Node) -> cpu_attention.Caches:
    key, value = (CACHE_FORMATS[name] for name in node.overload.split("_")[:2])
    return cpu_attention.Caches(key, value)


def _all(tensor: Expr) -> tuple[Expr, cpu_norm.Columns]:
    """All columns of a tensor."""
    return tensor, cpu_norm.Columns(int(shape_of(tensor)[-1]))


def _appended(
    builder: _Builder,
    attention: cpu_attention.Attention,
    caches: cpu_attention.Caches,
    k: tuple[Expr, cpu_norm.Columns],
    v: tuple[Expr, cpu_norm.Columns],
    past: Expr,
    parts: Sequence[Expr],
) -> list[Expr]:
    """The caches with new keys and values."""
    placed = replace(attention, k=k[1], v=v[1])
    append = builder.kernel(builder.kernels.attention.append, placed, caches)
    places = list(range(3, 3 + len(parts)))
    args = [k[0], v[0], past, *parts]
    return _in_place(builder, append, args, places, [p.ty for p in parts])


def _in_place(
    builder: _Builder, kernel: Any, args: list[Expr], places: list[int], types: list[Any]
) -> list[Expr]:
    """Call a kernel that writes to arguments; a place of -1 is a new tensor."""
    emit = builder.scope.emit
    found = emit(relax.op.call_tir_inplace(kernel, args, places, types))
    return [emit(relax.TupleGetItem(found, i)) for i in range(len(types))]


def _attended(
    builder: _Builder,
    attention: cpu_attention.Attention,
    caches: cpu_attention.Caches,
    q: tuple[Expr, cpu_norm.Columns],
    past: Expr,
    parts: Sequence[Expr],
) -> Expr:
    placed = replace(attention, q=q[1])
    attend = builder.kernel(builder.kernels.attention.attend, placed, caches)
    batch, seq, _ = shape_of(q[0])
    flat = relax.TensorType((batch, seq, attention.heads * attention.dim), "float32")
    scratch = _scratch(builder, attention, batch)
    out = builder.scope.emit(relax.call_tir(attend, [q[0], past, *parts], [flat, *scratch]))
    return builder.scope.emit(relax.TupleGetItem(out, 0)) if scratch else out


def _attention(builder: _Builder, node: ir.Node) -> Expr:
    """Attention without a cache, over all keys that its mask lets through."""
    heads = int(node.attributes.get_int("q_num_heads", 0) or 0)
    kv_heads = int(node.attributes.get_int("kv_num_heads", 0) or 0)
    if not heads or len([v for v in node.inputs if v is not None]) > 4 or len(node.outputs) > 1:
        raise UnsupportedError(f"{graph.describe(node)}: this form of it is not supported")
    (q, q_at), (k, k_at), (v, v_at) = (builder.source(x) for x in node.inputs[:3])
    q_value = node.inputs[0]
    assert q_value is not None and q_value.shape is not None
    dim = int(q_value.shape[-1]) // heads  # type: ignore[arg-type]
    attention = cpu_attention.Attention(
        heads,
        kv_heads,
        dim,
        float(node.attributes.get_float("scale", dim**-0.5) or dim**-0.5),
        causal=node.attributes.get_int("is_causal", 0) == 1,
        softcap=float(node.attributes.get_float("softcap", 0.0) or 0.0),
        q=q_at,
        k=k_at,
        v=v_at,
    )
    args, mask = [q, k, v], None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        tensor = builder.tensor(node.inputs[3])
        shape = shape_of(tensor)
        if len(shape) != 4:
            raise UnsupportedError(f"{graph.describe(node)}: a mask of rank {len(shape)}")
        per_head, per_query = (not (isinstance(d, int) and d == 1) for d in shape[1:3])
        mask = cpu_attention.Mask(str(tensor.ty.dtype), per_head, per_query)
        args.append(tensor)
    kernel = builder.kernel(builder.kernels.attention.attend_all, attention, mask)
    return builder.call(kernel, args, (*shape_of(q)[:-1], heads * dim))


FUSED: Final[Mapping[tuple[str, str], Callable[[_Builder, ir.Node], Any]]] = {
    (graph.DOMAIN, "MixedLinear"): _mixed_linear,
    (graph.DOMAIN, "MixedGather"): _mixed_gather,
    (graph.DOMAIN, "MixedConv"): _mixed_conv,
    (graph.DOMAIN, "Linear"): _linear,
    (graph.DOMAIN, RESIDUAL_NORM): _residual_norm,
    (graph.DOMAIN, GATE): _gate,
    (graph.DOMAIN, "CachedAttention"): _cached_attention,
    (graph.DOMAIN, ROTARY_ATTENTION): _rotary_attention,
    ("", "Attention"): _attention,
    ("", "LayerNormalization"): _norm,
    ("", "RMSNormalization"): _norm,
    ("", "Reshape"): _reshape,
    ("", "RotaryEmbedding"): _rotary,
    ("", "Softmax"): _softmax,
}
"""Operators that have kernels of our own; ``relax_ops.OPERATORS`` has the others."""


@relax.expr_functor.mutator
class _ShapeSharer(relax.PyExprMutator):  # type: ignore[misc]
    """Binds each shape of symbolic dims once; the virtual machine makes one for every mention."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._shared: dict[Any, Expr] = {}

    def visit_call_(self, call: Any) -> Any:
        args = [self._shape(arg) if isinstance(arg, relax.ShapeExpr) else arg for arg in call.args]
        return super().visit_call_(
            relax.Call(call.op, args, call.attrs, call.ty_args, call.span, ret_ty=call.ty)
        )

    def _shape(self, shape: Any) -> Expr:
        if all(isinstance(dim, tirx.IntImm) for dim in shape.values):
            return shape
        key = tuple(map(str, shape.values))
        if key not in self._shared:
            self._shared[key] = self.builder_.emit(shape)
        return self._shared[key]


@tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
def share_shapes(module: Any, _context: Any) -> Any:
    """Make every shape once a call."""
    for var, function in module.functions_items():
        if isinstance(function, relax.Function):
            module[var] = _ShapeSharer(module).visit_expr(function)
    return module


def phases(target: Target) -> dict[str, list[Any]]:
    """TVM's passes in the order in which they run, by phase."""
    transform = relax.transform
    capture = [cuda_graph.capture(DECODE)] if families.of(target).graphs else []

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def schedule(module: Any, _context: Any) -> Any:
        return families.of(target).schedule(module)

    return {
        # Reshapes stay as they are: the virtual machine makes a view, and copies nothing.
        "legalize": [
            transform.LegalizeOps(skip_ops=["relax.reshape"]),
            transform.AnnotateTIROpPattern(),
        ],
        "fuse": [transform.FoldConstant(), transform.FuseOps(), transform.FuseTIR()],
        "schedule": [schedule],
        "lower": [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            *capture,
            transform.LowerAllocTensor(),
            share_shapes,
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ],
    }


def check(target: Target) -> None:
    """Refuse a target that ``build`` would fail for, before hours are spent on a model.

    Raises:
        UsageError: there are no kernels for its instructions, or nothing here compiles or links
            for it.
    """
    linker.find(target.triple)
    with families.of(target).building():
        pass


def build(lowered: Lowered, target: Target, library: Path) -> None:
    """Compile a lowered module to a shared library.

    Raises:
        UsageError: it cannot be linked for the target here.
    """
    compile_module(lowered.module, target, library)


def compile_module(module: Any, target: Target, library: Path) -> None:
    """Compile a Relax module, by the target's passes, to a shared library.

    Raises:
        UsageError: it cannot be linked for the target here.
    """

    def link(output: str, objects: Sequence[str], **_options: Any) -> None:
        linker.link(target.triple, output, objects)

    tvm_target = tvm.target.Target(dict(target.tvm))
    passes = [step for phase in phases(target).values() for step in phase]
    family = families.of(target)
    with tvm_target, family.building():
        program = tvm.compile(
            module,
            target=tvm_target,
            relax_pipeline=tvm.transform.Sequential(passes),
            tir_pipeline=family.pipeline,
        )
    program.export_library(str(library), fcompile=link)
