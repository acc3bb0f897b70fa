"""Bytes of rows8 are what they were when it was written."""

import numpy as np

from onnxcomp.passes.codecs import CODECS


def test_bytes_are_golden(make_site):
    weight = np.array([[1, -2, 0.5, 4]], np.float32)
    codec = CODECS["rows8"]
    payload = codec.encode(make_site(1, 4), weight, codec.params_type())
    assert payload.tensors["codes"].tolist() == [[32, -64, 16, 127]]
    assert payload.tensors["scale"] == np.float32(4) / np.float32(127)
