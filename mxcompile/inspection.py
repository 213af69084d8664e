"""What an artifact, a plan or an ONNX model holds, as data that is the same for all three."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mxcompile import artifact as artifacts
from mxcompile.artifact import Artifact, KvCache
from mxcompile.errors import UsageError
from mxcompile.plan import ROW_TILE, PrecisionPlan, Unit, tile_bytes


def inspect(path: Path) -> dict[str, Any]:
    """Describe what is at ``path``; the key ``kind`` says what it is.

    Raises:
        UsageError: it is none of the three, or damaged.
    """
    if path.is_dir():
        return describe_artifact(artifacts.load(path))
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    if path.suffix == ".json":
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}") from error
        return {"kind": "plan", **describe_plan(PrecisionPlan.from_json(data))}
    return _describe_model(path)


def describe_artifact(artifact: Artifact) -> dict[str, Any]:
    """Describe an artifact and the plan in it."""
    manifest, plan = artifact.manifest, artifact.plan()
    vocabulary = manifest.generation.vocabulary if manifest.generation else None
    tensors = describe_plan(plan)["tensors"]
    of_text = [t for t in tensors if t["rows"] == vocabulary]
    rest = manifest.parameters - sum(t["parameters"] for t in of_text)
    rest_bytes = artifact.weight_bytes - sum(t["bytes"] for t in of_text)
    return {
        "kind": manifest.kind,
        "name": manifest.name,
        "target": manifest.target,
        "budget": manifest.budget,
        "activations": manifest.activations,
        "kv_cache": _describe_caches(manifest.kv_cache) if manifest.kv_cache else None,
        "pipeline": manifest.pipeline,
        "plan_digest": manifest.plan_digest,
        "versions": dict(manifest.versions),
        "parameters": manifest.parameters,
        "weight_bytes": artifact.weight_bytes,
        "code_bytes": manifest.files[artifacts.CODE].bytes,
        "bits_per_weight": artifact.bits_per_weight,
        "decoder_bits_per_weight": 8 * rest_bytes / rest if of_text and rest else None,
        "formats": plan.parameters_by_format(),
        "inputs": [str(spec) for spec in manifest.inputs],
        "outputs": [str(spec) for spec in manifest.outputs],
        "quality": dict(manifest.quality),
        "tensors": tensors,
    }


def describe_plan(plan: PrecisionPlan) -> dict[str, Any]:
    """Describe a plan; its bits count what is packed, not the model's other tensors."""
    parameters = sum(unit.parameters for unit in plan.units)
    return {
        "parameters": parameters,
        "weight_bytes": plan.weight_bytes,
        "bits_per_weight": 8 * plan.weight_bytes / parameters,
        "formats": plan.parameters_by_format(),
        "caches": {name: fmt.name for name, fmt in plan.caches.items()},
        "plan_digest": plan.digest,
        "tensors": [_describe_unit(plan, unit) for unit in plan.units],
    }


def _describe_caches(cache: KvCache) -> dict[str, Any]:
    """Bytes of a token of context, by layer; bits a number with the scales in them."""
    numbers = sum(2 * layer.kv_heads * layer.head_dim for layer in cache.layers)
    return {
        "token_bytes": cache.token_bytes,
        "bits": 8 * cache.token_bytes / numbers,
        "keys": dict(Counter(layer.key for layer in cache.layers)),
        "values": dict(Counter(layer.value for layer in cache.layers)),
        "layers": [asdict(layer) | {"token_bytes": layer.token_bytes} for layer in cache.layers],
    }


def _describe_unit(plan: PrecisionPlan, unit: Unit) -> dict[str, Any]:
    tiles = Counter(plan.tiles[unit.name].formats)
    size = sum(count * tile_bytes(unit.columns, fmt) for fmt, count in tiles.items())
    return {
        "name": unit.name,
        "rows": unit.rows,
        "columns": unit.columns,
        "parameters": unit.parameters,
        "bytes": size,
        "bits": 8 * size / unit.parameters,
        "tiles": {fmt.name: tiles[fmt] for fmt in sorted(tiles, key=lambda fmt: fmt.bits)},
    }


def _describe_model(path: Path) -> dict[str, Any]:
    # Looking at an artifact must not cost importing ONNX.
    from mxcompile import graph

    model = graph.load(path)
    units = graph.units(model)
    return {
        "kind": "model",
        "name": model.graph.name,
        "parameters": graph.parameters(model),
        "inputs": [_typed(value) for value in model.graph.inputs],
        "outputs": [_typed(value) for value in model.graph.outputs],
        "operators": dict(Counter(node.op_type for node in model.graph).most_common()),
        "row_tile": ROW_TILE,
        "tensors": [
            {
                "name": unit.name,
                "rows": unit.rows,
                "columns": unit.columns,
                "parameters": unit.parameters,
            }
            for unit in units
        ],
    }


def _typed(value: Any) -> str:
    shape = ", ".join(str(dim) for dim in value.shape) if value.shape is not None else "?"
    return f"{value.name}: {value.dtype}[{shape}]"
