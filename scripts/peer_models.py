"""Write the models that onnxruntime and OpenVINO run best: int4 weights, and logits of one token.

``FOLDER/onnxruntime.onnx`` has MatMulNBits with int8 activations (accuracy level 4) in groups of
32; ``FOLDER/openvino.xml`` has weights that NNCF compressed to int4 in groups of 32, the vocabulary
too, and keeps its caches as state. It is left out where NNCF is not installed; to have both::

    python3 -m venv build/openvino
    build/openvino/bin/pip install -c constraints.txt . openvino nncf
    build/openvino/bin/python scripts/peer_models.py model.onnx FOLDER
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

GROUP = 32


def last_token(model: ir.Model) -> None:
    """Let the head see the last token only, as every runtime does that generates text."""
    head = model.graph.outputs[0].producer()
    assert head is not None and head.op_type == "MatMul"
    hidden = head.inputs[0]
    index = ir.Value(name="last", const_value=ir.tensor(np.array([-1], np.int64), name="last"))
    model.graph.register_initializer(index)
    node = ir.node("Gather", [hidden, index], {"axis": 1}, num_outputs=1, name="last_token")
    node.outputs[0].name = "last_hidden"
    head.prepend(node)
    head.replace_input_with(0, node.outputs[0])
    shape = model.graph.outputs[0].shape
    assert shape is not None
    model.graph.outputs[0].shape = ir.Shape([shape[0], 1, shape[2]])


def fold_transposes(model: ir.Model) -> None:
    """Store weights as MatMul multiplies with them: quantizers look for such constants only."""
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.const_value is None:
            continue
        name = f"{source.name}.transposed"
        array = np.ascontiguousarray(source.const_value.numpy().T)
        folded = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        folded.shape, folded.type = ir.Shape(array.shape), source.type
        model.graph.register_initializer(folded)
        node.outputs[0].replace_all_uses_with(folded)
        model.graph.remove(node, safe=True)


def write_onnxruntime(source: Path, path: Path) -> None:
    """Quantize with onnxruntime's own tool."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source),
        block_size=GROUP,
        is_symmetric=False,
        accuracy_level=4,
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)


def write_openvino(source: Path, path: Path) -> None:
    """Compress with NNCF."""
    import nncf
    import openvino as ov
    from openvino._offline_transformations import apply_make_stateful_transformation

    model = ov.Core().read_model(source)
    names = [value.any_name for value in model.inputs]
    # One sequence: an empty state has no batch to infer it from.
    model.reshape(
        {
            value.any_name: ov.PartialShape([1, *list(value.partial_shape)[1:]])
            for value in model.inputs
        }
    )
    caches = {n: n.replace("past_key_values", "present") for n in names if n.startswith("past")}
    model = nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=GROUP, all_layers=True
    )
    apply_make_stateful_transformation(model, caches)
    ov.save_model(model, path)


def main() -> None:
    """Write both."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="that `mxcompile export` wrote")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = ir.load(args.model)
    last_token(model)
    fold_transposes(model)
    plain = args.folder / "float.onnx"
    ir.save(model, plain, external_data="float.onnx.data")
    write_onnxruntime(plain, args.folder / "onnxruntime.onnx")
    if importlib.util.find_spec("nncf"):
        write_openvino(plain, args.folder / "openvino.xml")


if __name__ == "__main__":
    main()
