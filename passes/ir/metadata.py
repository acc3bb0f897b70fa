"""Keys of the notes a loaded model carries for what ONNX IR has no field for.

They live in the `meta` of graphs, values and nodes, are copied with them, and are read back when
the model is written.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "EXTRA_VALUE_INFO",
    "GENERATED_NAME",
    "INPUT_INFO",
    "LISTED",
    "OUTPUT_INFO",
    "QUANTIZATION",
    "RANK",
    "SOURCE",
    "TRAINED",
    "TRAINING",
]

# Graph: paths of the files the model's tensors are read from.
SOURCE: Final = "onnxcomp.source"
# Graph: training_info messages of the model.
TRAINING: Final = "onnxcomp.training_info"
# Graph: value_info messages that name no value of the graph.
EXTRA_VALUE_INFO: Final = "onnxcomp.extra_value_info"
# Value: an initializer that has a value_info entry of its own.
LISTED: Final = "onnxcomp.listed"
# Value: the original message of a graph input or output, with the type and shape read from it.
INPUT_INFO: Final = "onnxcomp.input_info"
OUTPUT_INFO: Final = "onnxcomp.output_info"
# Value: a weight that is the product of two thin ones: the most that its rank can be.
RANK: Final = "onnxcomp.rank"
# Value: entries that several weights share and were trained for; the names of those that are left
# as they are, and still looked up in them.
TRAINED: Final = "onnxcomp.trained"
# Node: the name we gave it and the one it had, which is written while it still has ours.
GENERATED_NAME: Final = "onnxcomp.generated_name"
# Value: ONNX IR's own key for quantization annotations.
QUANTIZATION: Final = "quant_parameter_tensor_names"
