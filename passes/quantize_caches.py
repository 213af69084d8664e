"""Round the keys and values that are cached to the formats of their caches."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from mxcompile import caches, graph
from mxcompile.formats import CACHE_FORMATS, GROUP, LEAST_SCALE, CacheFormat
from mxcompile.pipeline import Context, Pass

ROUND: Final = "RoundCache"

_SCALE = """
    lead = Shape <end: int = -1> (x)
    by_group = Constant <value_ints: ints = [-1, {group}]> ()
    group_shape = Concat <axis: int = 0> (lead, by_group)
    groups = Reshape (x, group_shape)
    last = Constant <value_ints: ints = [-1]> ()
    high = ReduceMax <keepdims: int = 0> (groups, last)
    low = ReduceMin <keepdims: int = 0> (groups, last)
    depth = Neg (low)
    is_high = Greater (high, depth)
    peak = Where (is_high, high, low)
    lowest = Constant <value_float: float = {lowest}.0> ()
    ratio = Div (peak, lowest)
    half = Cast <to: int = 10> (ratio)
    near = Cast <to: int = 1> (half)
    zero = Constant <value_float: float = 0.0> ()
    vanished = Equal (near, zero)
    least = Constant <value_float: float = {least}> ()
    scale = Where (vanished, least, near)
    codes = QuantizeLinear <axis: int = -1, block_size: int = {group}, output_dtype: int = {code}>
        (x, scale)"""
"""The scale of each group of x, a number of fp16 in fp32, and the codes."""

_PACK = """
    wide = Cast <to: int = 6> (codes)
    sixteen = Constant <value: tensor = int32 {{16}}> ()
    nibbles = Mod (wide, sixteen)
    by_half = Constant <value_ints: ints = [-1, 2, {half}]> ()
    half_shape = Concat <axis: int = 0> (lead, by_half)
    halves = Reshape (nibbles, half_shape)
    one = Constant <value_int: int = 1> ()
    none = Constant <value_int: int = 0> ()
    lower = Gather <axis: int = -2> (halves, none)
    upper = Gather <axis: int = -2> (halves, one)
    raised = Mul (upper, sixteen)
    pairs = Add (lower, raised)
    flat = Concat <axis: int = 0> (lead, last)
    rows = Reshape (pairs, flat)
    numbers = Cast <to: int = 2> (rows)"""
"""Two codes a byte: column c of a group in the low bits, c + 16 in the high ones."""

_UNPACK = """
    wide = Cast <to: int = 6> (numbers)
    lead = Shape <end: int = -1> (numbers)
    by_half = Constant <value_ints: ints = [-1, 1, {half}]> ()
    half_shape = Concat <axis: int = 0> (lead, by_half)
    pairs = Reshape (wide, half_shape)
    sixteen = Constant <value: tensor = int32 {{16}}> ()
    eight = Constant <value: tensor = int32 {{8}}> ()
    lower = Mod (pairs, sixteen)
    upper = Div (pairs, sixteen)
    nibbles = Concat <axis: int = -2> (lower, upper)
    shifted = Add (nibbles, eight)
    wrapped = Mod (shifted, sixteen)
    signed = Sub (wrapped, eight)
    last = Constant <value_ints: ints = [-1]> ()
    flat = Concat <axis: int = 0> (lead, last)
    columns = Reshape (signed, flat)
    codes = Cast <to: int = 3> (columns)"""


def rounding(fmt: CacheFormat) -> str:
    """The function that rounds [..., columns] to a format and back, in ONNX's text form."""
    if not fmt.scaled:
        lines = f"numbers = Cast <to: int = {_type(fmt)}> (x) y = Cast <to: int = 1> (numbers)"
    else:
        lines = f"""{_scale(fmt)}
    y = DequantizeLinear <axis: int = -1, block_size: int = {GROUP}> (codes, scale)"""
    return _function(fmt, f"{ROUND} (x) => (y)", lines)


def encoder(fmt: CacheFormat) -> str:
    """The function from [..., columns] to the tensors of a cache: see ``caches.encode``."""
    if not fmt.scaled:
        return _function(
            fmt, "EncodeCache (x) => (numbers)", f"numbers = Cast <to: int = {_type(fmt)}> (x)"
        )
    lines = f"{_scale(fmt)} scales = Cast <to: int = 10> (scale)"
    if fmt.bits == 4:
        lines += _PACK.format(half=GROUP // 2)
    return _function(
        fmt, f"EncodeCache (x) => ({'numbers' if fmt.bits == 4 else 'codes'}, scales)", lines
    )


def decoder(fmt: CacheFormat) -> str:
    """The function from the tensors of a cache to [..., columns]: see ``caches.decode``."""
    if not fmt.scaled:
        return _function(fmt, "DecodeCache (numbers) => (y)", "y = Cast <to: int = 1> (numbers)")
    lines = _UNPACK.format(half=GROUP // 2) if fmt.bits == 4 else ""
    lines += f"""
    scale = Cast <to: int = 1> (scales)
    y = DequantizeLinear <axis: int = -1, block_size: int = {GROUP}> (codes, scale)"""
    return _function(
        fmt, f"DecodeCache ({'numbers' if fmt.bits == 4 else 'codes'}, scales) => (y)", lines
    )


def _scale(fmt: CacheFormat) -> str:
    code = ir.DataType.INT4 if fmt.bits == 4 else ir.DataType.INT8
    return _SCALE.format(group=GROUP, lowest=fmt.lowest, least=LEAST_SCALE, code=code.value)


def _type(fmt: CacheFormat) -> int:
    return ir.DataType.from_numpy(np.dtype(fmt.dtype)).value


def _function(fmt: CacheFormat, head: str, lines: str) -> str:
    return graph.overloaded(fmt.name, f" {head} {{ {lines} }}")


@dataclass(frozen=True)
class QuantizeCaches(Pass):
    """Let attention read its new keys and values as they will be cached.

    A ``RoundCache`` is standard nodes: QuantizeLinear and DequantizeLinear with scales that are
    found at run time, or Casts. The past was rounded when it was the present. What is cached as
    float32 stays as it is.

    Before: ``Attention(%q, %k, %v, %mask, %past_key @int8, %past_value @int4)``;
    after: ``Attention(%q, %k.cached, %v.cached, ...)`` with ``%k.cached = RoundCache:int8(%k)``.
    """

    name = "quantize-caches"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Round what is appended to annotated caches."""
        changed = False
        done: dict[tuple[ir.Value, CacheFormat], ir.Value] = {}
        for node in graph.select(model.graph, "Attention"):
            for slot in (1, 2):
                past = node.inputs[slot + 3] if len(node.inputs) > 5 else None
                scheme = None if past is None else graph.scheme_of(past)
                new = node.inputs[slot]
                if scheme is None or new is None:
                    continue
                fmt = CACHE_FORMATS[scheme.partition("/")[0]]
                if fmt == caches.FLOAT:
                    continue
                if (new, fmt) not in done:
                    done[new, fmt] = _round(model, new, fmt)
                node.replace_input_with(slot, done[new, fmt])
                changed = True
        return changed


def _round(model: ir.Model, value: ir.Value, fmt: CacheFormat) -> ir.Value:
    graph.define(model, rounding(fmt))
    node = ir.Node(
        graph.DOMAIN, ROUND, [value], overload=fmt.name, name=f"{graph.name(value)}.{fmt}"
    )
    result = node.outputs[0]
    result.name, result.type, result.shape = node.name, value.type, value.shape
    if (producer := value.producer()) is not None:
        model.graph.insert_after(producer, node)
    else:
        model.graph.insert_before(next(iter(model.graph)), node)
    return result
