"""Functions over ``onnx_ir.Model``, which is the graph itself: there is no wrapper class.

Fused operators live in the domain ``mxcompile`` as model-local functions whose body is their
definition in standard operators, so that every stage of the pipeline can be evaluated.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from mxcompile.errors import UnsupportedError, UsageError
from mxcompile.plan import ROW_TILE, Unit

DOMAIN: Final = "mxcompile"
OPSET: Final = 23
LOGITS: Final = "logits"
SCHEME_KEY: Final = "mxcompile.scheme"
ADDED_KEY: Final = "mxcompile.added"

MIN_COLUMNS: Final = 32
"""Matrices with fewer columns than a group, or fewer rows than a tile, stay float."""

UseKind: TypeAlias = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True, slots=True)
class Use:
    """One place where a weight is read, and how."""

    node: ir.Node
    kind: UseKind


def load(path: Path) -> ir.Model:
    """Read an ONNX model; external data is mapped when it is read, not copied.

    Raises:
        UsageError: the file is missing, is not an ONNX model, or names external data that is
            missing, too short, or outside the model's folder.
        UnsupportedError: the model's operator set cannot be brought to ``OPSET``.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        model = ir.load(path)
    except Exception as error:  # hostile bytes reach protobuf and onnx_ir: any error means "no"
        raise UsageError(f"{path}: not a readable ONNX model ({_first_line(error)})") from error
    if not any(True for _ in model.graph) or not model.graph.outputs:
        raise UsageError(f"{path}: not an ONNX model: the graph has no nodes or no outputs")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            _check_external(path, value.const_value)
    return _to_opset(path, model)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    """Refuse external data that leaves the model's folder, is missing, or is too short."""
    folder = path.parent.resolve()
    location = Path(tensor.location)
    data = (folder / location).resolve()
    if location.is_absolute() or not data.is_relative_to(folder):
        raise UsageError(
            f"{path}: tensor {tensor.name} points outside the model's folder: {location}"
        )
    if not data.is_file():
        raise UsageError(
            f"{path}: tensor {tensor.name} needs the file {location}, which is missing"
        )
    needed = (tensor.offset or 0) + tensor.nbytes
    if (tensor.offset or 0) < 0 or tensor.length not in (None, tensor.nbytes):
        raise UsageError(f"{path}: tensor {tensor.name} has an impossible place in {location}")
    if data.stat().st_size < needed:
        raise UsageError(
            f"{path}: tensor {tensor.name} needs {needed} bytes of {location}, "
            f"which has {data.stat().st_size}"
        )


def _to_opset(path: Path, model: ir.Model) -> ir.Model:
    """Bring an older model to ``OPSET`` with ONNX's own converter."""
    version = model.graph.opset_imports.get("", OPSET)
    if version >= OPSET:
        return model
    try:
        return ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), OPSET))
    except Exception as error:  # the converter raises RuntimeError, ValueError and its own
        raise UnsupportedError(
            f"{path}: opset {version} cannot be converted to {OPSET} ({_first_line(error)}); "
            "export the model with a newer opset"
        ) from error


def fix_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give inputs sizes instead of free dimensions, as ``name -> sizes``.

    Raises:
        UsageError: there is no such input, or it has other sizes.
    """
    inputs = {name(v): v for v in model.graph.inputs}
    for key, sizes in shapes.items():
        if key not in inputs:
            raise UsageError(f"the model has no input {key}; inputs: {', '.join(inputs)}")
        known = shape(inputs[key])
        fits = len(known) == len(sizes) and all(
            isinstance(k, str) or k in (-1, s) for k, s in zip(known, sizes, strict=True)
        )
        if not fits:
            raise UsageError(f"input {key} has the shape {known}, not {tuple(sizes)}")
        inputs[key].shape = ir.Shape(sizes)
    if shapes:  # what was inferred from free dimensions is less than what can be known now
        for node in model.graph:
            for value in node.outputs:
                value.shape = None


def infer_shapes(model: ir.Model) -> None:
    """Fill in the types and shapes that ONNX's shape inference finds."""
    common_passes.ShapeInferencePass()(model)


def prune(model: ir.Model) -> None:
    """Remove nodes, initializers, functions and operator sets that nothing uses."""
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]


def name(value: ir.Value) -> str:
    """The name of a value; values of a loaded graph always have one."""
    assert value.name is not None
    return value.name


def describe(node: ir.Node) -> str:
    """How errors speak of a node: its name, operator and domain."""
    return (
        f"node '{node.name or name(node.outputs[0])}' ({node.domain or 'ai.onnx'}::{node.op_type})"
    )


def values(model: ir.Model) -> Iterator[ir.Value]:
    """All values of the main graph: inputs, initializers, then node outputs in order."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def array(value: ir.Value | None) -> np.ndarray:
    """The contents of a constant.

    Raises:
        UnsupportedError: the value is computed at run time.
    """
    if value is None or value.const_value is None:
        raise UnsupportedError(f"{value.name if value else 'an input'} must be a constant")
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer (and not also an input that a caller may replace)."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def constant(
    model: ir.Model, base: str, data: np.ndarray, dtype: ir.DataType | None = None
) -> ir.Value:
    """Register an initializer named ``base``, or ``base.1`` and so on where that is taken."""
    taken = model.graph.initializers
    fresh = next(n for n in _names(base) if n not in taken)
    tensor = ir.Tensor(data, dtype=dtype, name=fresh)
    value = ir.Value(
        name=fresh, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def change_constant(model: ir.Model, unit: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put what ``change`` makes of an initializer in its place; shape and type stay.

    It is made when it is asked for: weights are most of a model.
    """
    value = model.graph.initializers[unit]
    data = value.const_value
    assert data is not None and value.shape is not None
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(change(data.numpy())),
        dtype=data.dtype,
        shape=ir.Shape(value.shape.numpy()),
        name=unit,
    )


def _names(base: str) -> Iterator[str]:
    yield base
    index = 0
    while True:
        index += 1
        yield f"{base}.{index}"


def node_after(
    anchor: ir.Node | None,
    model: ir.Model,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    output: str,
    *,
    domain: str = "",
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """Insert a node with one output before the rest of the graph or after ``anchor``."""
    node = ir.node(op_type, list(inputs), attributes or {}, domain=domain, name=output)
    node.outputs[0].name = output
    if anchor is None:
        first = next(iter(model.graph))
        model.graph.insert_before(first, node)
    else:
        model.graph.insert_after(anchor, node)
    return node.outputs[0]


def annotate(value: ir.Value, scheme: str) -> bool:
    """Write a scheme onto a value; tell whether that changed anything."""
    changed = value.metadata_props.get(SCHEME_KEY) != scheme
    value.metadata_props[SCHEME_KEY] = scheme
    return changed


def scheme_of(value: ir.Value) -> str | None:
    """The scheme that ``annotate`` wrote, if any."""
    return value.metadata_props.get(SCHEME_KEY)


def overloaded(overload: str, text: str) -> str:
    """A function of our own in ONNX's text form, of which there are some by one name."""
    domains = f'opset_import: ["" : {OPSET}, "{DOMAIN}" : 1], domain: "{DOMAIN}"'
    return f'<{domains}, overload: "{overload}">{text}'


def define(model: ir.Model, text: str) -> None:
    """Add a model-local function, given in ONNX's text form, unless it is there already."""
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions.setdefault(function.identifier(), function)
    model.graph.opset_imports.setdefault(function.domain, 1)


def outline(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    op_type: str,
    overload: str,
) -> ir.Node:
    """Replace ``nodes``, in topological order, by one call of a function that holds them.

    Copies are taken, so nodes that others use too stay where they are; ``outputs`` are redirected
    to the call, which stands after the last of ``nodes``. Initializers must be among ``inputs``.
    """
    parameters = [ir.Value(name=f"in{i}", type=v.type, shape=v.shape) for i, v in enumerate(inputs)]
    inside: dict[ir.Value, ir.Value] = dict(zip(inputs, parameters, strict=True))
    body: list[ir.Node] = []
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else inside[v] for v in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            inside[old] = new
        body.append(copy)
    imports = {d: v for d, v in model.graph.opset_imports.items() if d in {n.domain for n in nodes}}
    function = ir.Function(
        DOMAIN,
        op_type,
        overload,
        graph=ir.Graph(parameters, [inside[v] for v in outputs], nodes=body, opset_imports=imports),
        attributes=[],
    )
    model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    call = ir.Node(
        DOMAIN, op_type, list(inputs), overload=overload, num_outputs=len(outputs), name=overload
    )
    model.graph.insert_after(nodes[-1], call)
    for old, new in zip(outputs, call.outputs, strict=True):
        new.type, new.shape, new.name = old.type, old.shape, old.name
        replace_uses(model, old, new)
        old.name = f"{old.name}.outlined"
    return call


def replace_uses(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads ``old`` read ``new``, graph outputs included."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def take_place(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be what ``old`` was: its type, shape and name, and everything that reads it."""
    new.type, new.shape, new.name, old.name = old.type, old.shape, old.name, None
    replace_uses(model, old, new)


def come_after(old: ir.Value, new: ir.Value, suffix: str) -> None:
    """Let ``new``, computed from ``old``, be that to all others; ``old`` goes by another name."""
    node = new.producer()
    assert node is not None
    slots = [slot for slot, value in enumerate(node.inputs) if value is old]
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    for slot in slots:
        node.replace_input_with(slot, old)
    old.name, new.name = f"{old.name}.{suffix}", old.name


def read_once(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """What computes a value that one node alone reads, if it is such an operator."""
    node = value.producer() if value is not None else None
    if value is None or node is None or (node.domain, node.op_type) != ("", op_type):
        return None
    return node if len(value.uses()) == 1 and not value.is_graph_output() else None


def last_axis_only(node: ir.Node, rank: int) -> bool:
    """Whether an operator that has an axis, or works on all from it on, is given the last one."""
    return int(node.attributes.get_int("axis", -1) or 0) % rank == rank - 1


def weight_of(node: ir.Node) -> tuple[ir.Value, UseKind] | None:
    """The weight that a node reads as a plannable matrix, if it does."""
    if node.domain == DOMAIN and node.op_type == "Linear" and is_constant(node.inputs[1]):
        return _checked(node.inputs[1], "linear")
    if node.domain == "" and node.op_type == "Gather" and is_constant(node.inputs[0]):
        axis = node.attributes.get_int("axis", 0)
        return _checked(node.inputs[0], "embedding") if axis == 0 else None
    grouped = node.attributes.get_int("group", 1) != 1
    if node.domain == "" and node.op_type == "Conv" and is_constant(node.inputs[1]) and not grouped:
        return _checked(node.inputs[1], "conv")
    return None


def _checked(value: ir.Value | None, kind: UseKind) -> tuple[ir.Value, UseKind] | None:
    """The pair when the weight is a float matrix that is large enough to tile."""
    assert value is not None
    shape = value.shape
    if value.dtype != ir.DataType.FLOAT or shape is None or len(shape) < 2:
        return None
    if kind != "conv" and len(shape) != 2:
        return None
    rows, columns = matrix_shape(value)
    return (value, kind) if rows >= ROW_TILE and columns >= MIN_COLUMNS else None


def matrix_shape(value: ir.Value) -> tuple[int, int]:
    """Rows and columns of a weight: the first axis against all others."""
    assert value.shape is not None
    rows, *rest = value.shape.numpy()
    return int(rows), int(np.prod(rest, dtype=np.int64))


def uses(model: ir.Model) -> dict[str, list[Use]]:
    """The plannable weights, by name, with every place that reads them.

    A weight that something else reads too (say, a Mul) is not plannable and is left out.
    """
    found: dict[ir.Value, list[Use]] = {}
    for node in model.graph:
        if (hit := weight_of(node)) is not None:
            found.setdefault(hit[0], []).append(Use(node, hit[1]))
    return {
        name(v): u for v, u in found.items() if len(u) == len(v.uses()) and not v.is_graph_output()
    }


def layers(model: ir.Model) -> dict[ir.Node, str]:
    """The linear layers whose weights nothing else reads, and these weights' names."""
    return {
        found[0].node: unit
        for unit, found in uses(model).items()
        if len(found) == 1 and found[0].kind == "linear"
    }


def units(model: ir.Model) -> tuple[Unit, ...]:
    """The plannable weights of a canonical model, in graph order."""
    initializers = model.graph.initializers
    return tuple(Unit(n, *matrix_shape(initializers[n])) for n in uses(model))


def weight(model: ir.Model, unit: str) -> np.ndarray:
    """A unit's float32 weights [rows, columns]; a view of the mapped file where it can be."""
    data = array(model.graph.initializers[unit])
    return data.reshape(data.shape[0], -1)


def mark_added(value: ir.Value) -> None:
    """Mark a constant that is none of the model's own, so that it does not count as parameters."""
    value.metadata_props[ADDED_KEY] = "yes"


def parameters(model: ir.Model) -> int:
    """The number of the model's own float weights; tied ones count once."""
    return sum(
        v.const_value.size
        for v in model.graph.initializers.values()
        if v.const_value is not None
        and v.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        and ADDED_KEY not in v.metadata_props
    )


def to_text(model: ir.Model) -> str:
    """The graph for the eye: a line a node, with types, and schemes after an ``@``."""

    def show(value: ir.Value | None) -> str:
        return "_" if value is None else f"%{value.name}"

    def typed(value: ir.Value) -> str:
        shape = "x".join(map(str, value.shape)) if value.shape is not None else "?"
        dtype = value.dtype.short_name() if value.dtype is not None else "?"
        scheme = f" @{scheme_of(value)}" if scheme_of(value) else ""
        return f"{show(value)}: {shape}{'x' if shape else ''}{dtype}{scheme}"

    lines = [f"graph {model.graph.name}({', '.join(map(typed, model.graph.inputs))})"]
    lines += [f"  weight {typed(v)}" for v in model.graph.initializers.values()]
    for node in model.graph:
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        attributes = ", ".join(
            f"{a.name}={a.value}"
            for a in node.attributes.values()
            if a.type != ir.AttributeType.TENSOR
        )
        arguments = ", ".join(map(show, node.inputs))
        options = f"<{attributes}>" if attributes else ""
        lines.append(f"  {', '.join(map(typed, node.outputs))} = {operator}{options}({arguments})")
    lines.append(f"  return {', '.join(map(show, model.graph.outputs))}")
    return "\n".join(lines) + "\n"


def shape(value: ir.Value) -> tuple[int | str, ...]:
    """The shape of a value; free dimensions by name.

    Raises:
        UnsupportedError: not even its rank is known.
    """
    if value.shape is None:
        raise UnsupportedError(f"{value.name} has no known shape")
    return tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)


def last_product(model: ir.Model) -> ir.Node | None:
    """The last matrix product on the way to the logits that has as many columns, if any has."""
    logits = next((v for v in model.graph.outputs if v.name == LOGITS), None)
    if logits is None or logits.shape is None:
        return None
    products = [
        node
        for node in ancestors(logits, lambda v: False)
        if node.op_type in ("MixedLinear", "Linear", "MatMul")
        and (node.outputs[0].shape or logits.shape)[-1] == logits.shape[-1]
    ]
    return products[-1] if products else None


def select(nodes: Iterable[ir.Node], op_type: str, domain: str = "") -> list[ir.Node]:
    """The nodes of one operator, as a list that survives edits of the graph."""
    return [n for n in nodes if n.op_type == op_type and n.domain == domain]


def ancestors(value: ir.Value, stop: Callable[[ir.Value], bool]) -> list[ir.Node]:
    """The nodes that compute ``value``, up to values where ``stop`` holds.

    Topological order; what computes an input comes before what computes the next one.
    """
    order: list[ir.Node] = []
    seen: set[ir.Node] = set()
    stack: list[tuple[ir.Value, bool]] = [(value, False)]
    while stack:
        current, done = stack.pop()
        node = current.producer()
        if node is None or stop(current):
            continue
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((current, True))
            stack.extend((v, False) for v in reversed(node.inputs) if v is not None)
    return order
