"""The graph layer on real models: structure, and results bit for bit."""

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest

from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.dense import DenseParams
from onnxcomp.passes.ir.loader import from_gs
from onnxcomp.passes.ir.model import copy_model, load, output_size, save
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.runtime.inputs import synthesize_inputs

NAMES = [
    "basic_pitch_nmp", "dtln_1", "fastestdet", "gtcrn_simple", "magika_standard_v3_3", "mnist_cntk",
    "mobilenetv2_224_tf2ptq_fp32", "nnsplit_en_lstm", "openseeface_lm0", "openseeface_mnv3_det",
    "ppocrv3_det", "resnet20_cifar10", "silero_vad", "silero_vad_16k_op15", "sklearn_randomforest",
    "squeezenet_fp16", "style_candy", "super_resolution", "tiny_random_gpt2", "tiny_random_lfm2",
    "tract_byte_bidi_lstm", "ultraface_rfb320", "winml_cifar_classifier", "yolox_nano",
    "tinyllama_ref", "tinyllama_ref_kv",
]  # fmt: skip


# Seconds per run at its fixed size of 720 x 720: structure only.
RUNNABLE = [name for name in NAMES if name != "style_candy"]

# One of each kind: subgraphs, ML operators, half precision, listed initializers, LSTM, Gemm, Conv.
TYPICAL = [
    "silero_vad", "sklearn_randomforest", "squeezenet_fp16", "mnist_cntk", "dtln_1", "gtcrn_simple",
    "winml_cifar_classifier", "resnet20_cifar10", "tinyllama_ref", "tiny_random_gpt2",
]  # fmt: skip


@pytest.fixture
def path(request, data_folder):
    for folder in ("models", "lm"):
        found = data_folder / folder / f"{request.param}.onnx"
        if found.exists():
            return found
    pytest.skip(f"no {request.param}.onnx in {data_folder}")


@pytest.mark.parametrize("path", NAMES, indirect=True)
def test_loading_and_saving_keep_the_structure(path, tmp_path, tools):
    model = copy_model(load(path))
    for mode in ("always", "never"):
        name = f"{mode}.onnx"
        expected = output_size(model, external_data=mode, name=name)
        saved = save(model, tmp_path / name, external_data=mode)
        assert saved.bytes == expected == sum(file.stat().st_size for file in saved.files)
        assert tools.differences(onnx.load(path), onnx.load(tmp_path / name)) == []


@pytest.mark.parametrize("path", TYPICAL, indirect=True)
def test_graphsurgeon_gives_the_model_back(path, tools):
    surgeon = pytest.importorskip("onnxcomp.passes.ir.graphsurgeon")
    model = load(path)
    result = from_gs(surgeon.to_gs(model))
    assert tools.differences(tools.proto_of(model), tools.proto_of(result)) == []


def rewritten(path, target):
    """The model with every matrix through the whole machinery, unchanged."""
    dense = CODECS["dense"]
    model = load(path)
    canonicalize(model)
    sites = find_sites(model, min_size=0).sites
    placements = [
        Placement(site, dense, dense.encode(site, read_weight(model, site), DenseParams()))
        for site in sites
    ]
    change = rewrite(model, placements)
    assert (change.count >= len(sites)) and not model.functions
    save(model, target)


@pytest.mark.parametrize("path", RUNNABLE, indirect=True)
def test_dense_payloads_give_the_same_bits(path, tmp_path, tools):
    target = tmp_path / "out.onnx"
    rewritten(path, target)
    feeds = synthesize_inputs(path)[0]
    before, after = (tools.flat(tools.run(each, feeds)) for each in (path, target))
    for one, two in zip(before, after, strict=True):
        equal_nan = one.dtype.kind == "f"
        assert one.dtype == two.dtype and np.array_equal(one, two, equal_nan=equal_nan)


@pytest.mark.parametrize("path", TYPICAL, indirect=True)
def test_a_compressed_model_expands_to_what_its_portable_form_computes(path, tmp_path, tools):
    hyper = CODECS["hyper"]
    model = load(path)
    canonicalize(model)
    params = hyper.params_type()
    sites = [site for site in find_sites(model).sites if hyper.refuse(site) is None][:8]
    payloads = [hyper.encode(site, read_weight(model, site), params, threads=2) for site in sites]
    pairs = zip(sites, payloads, strict=True)
    rewrite(model, [Placement(site, hyper, load_, "auto", params) for site, load_ in pairs])
    small, dense = tmp_path / "small.onnx", tmp_path / "dense.onnx"
    save(model, small)
    onnx.checker.check_model(small)
    model = load(small)
    expand(model)
    save(model, dense)
    onnx.checker.check_model(dense)
    feeds = synthesize_inputs(path)[0]
    before, after = (tools.flat(tools.run(each, feeds)) for each in (small, dense))
    for one, two in zip(before, after, strict=True):
        if one.dtype.kind == "f" and one.size:
            scale = max(float(np.abs(one).max()), 1e-30)
            assert float(np.abs(one.astype(np.float64) - two).max()) <= 1e-4 * scale
        else:
            np.testing.assert_array_equal(one, two)


MEASURE = """
import re, sys
from onnxcomp.passes.ir.model import load, save, output_size
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.analysis.weight_sites import find_sites
model = load(sys.argv[1])
canonicalize(model)
found = find_sites(model)
assert sum(site.nbytes for site in found.sites) > 89e6
output_size(model, external_data="never")
save(model, sys.argv[2], external_data="never")
# The peak of ru_maxrss would count the memory of the process that started this one.
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_minilm_is_compiled_in_little_memory(minilm_path, tmp_path):
    command = [sys.executable, "-c", MEASURE, str(minilm_path), str(tmp_path / "out.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # 90 MB of weights, the largest 47 MB; the interpreter with its packages takes about 75 MiB.
    assert float(done.stdout) / 1024 < 200, done.stdout
