"""Passes over the ONNX half, one a file: their registry, and the pipelines as text."""

from typing import Final

REGISTRY: Final = {
    "canonicalize": "mxcompile.passes.canonicalize:Canonicalize",
    "flatten-attention": "mxcompile.passes.flatten_attention:FlattenAttention",
    "annotate": "mxcompile.passes.annotate:Annotate",
    "quantize-weights": "mxcompile.passes.quantize_weights:QuantizeWeights",
    "quantize-activations": "mxcompile.passes.quantize_activations:QuantizeActivations",
    "quantize-caches": "mxcompile.passes.quantize_caches:QuantizeCaches",
    "fuse-qdq": "mxcompile.passes.fuse_qdq:FuseQdq",
    "kv-cache": "mxcompile.passes.kv_cache:KvCache",
    "center-vocabulary": "mxcompile.passes.center_vocabulary:CenterVocabulary",
    "sort-vocabulary": "mxcompile.passes.sort_vocabulary:SortVocabulary",
    "smooth-attention": "mxcompile.passes.smooth_attention:SmoothAttention",
    "scale-columns": "mxcompile.passes.scale_columns:ScaleColumns",
    "sort-neurons": "mxcompile.passes.sort_neurons:SortNeurons",
    "select-logits": "mxcompile.passes.select_logits:SelectLogits",
    "fuse-residual": "mxcompile.passes.fuse_residual:FuseResidual",
    "fuse-gate": "mxcompile.passes.fuse_gate:FuseGate",
    "fuse-rotary": "mxcompile.passes.fuse_rotary:FuseRotary",
}

FRONT: Final = "canonicalize,flatten-attention"
"""Before calibration: the float model in the forms that later passes and the planner know."""

SMOOTH: Final = "smooth-attention"
"""Before calibration too, but on what a few samples say: the same model, whose keys and values lose
less when they are cached in few bits."""

ARRANGE: Final = "scale-columns,center-vocabulary,sort-vocabulary,sort-neurons"
"""After calibration, before planning: the same model in a form that loses less when quantized."""

QUANTIZE: Final = "annotate,quantize-weights,quantize-activations,quantize-caches"
"""The plan becomes standard Quantize/DequantizeLinear nodes; the result is what is emitted."""

FUSE: Final = "fuse-qdq,kv-cache,select-logits,fuse-residual,fuse-gate,fuse-rotary"
"""What the lowering takes: fused mixed-bit operators, caches updated in place."""
