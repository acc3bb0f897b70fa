"""No CUDA kernel reads or writes outside its tensors: emulated, with pages behind them that trap.

The process that runs the kernels dies at the first byte outside, so it is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import ctypes, mmap, sys
from pathlib import Path
import numpy as np
from gpu_calls import Calls
from gpu_compare import DTYPES, product_error
from gpu_weights import hash_case, hyper_case

libc = ctypes.CDLL(None, use_errno=True)

class EdgeMemory:
    '''Tensors that end where a page begins that nobody may touch.'''

    def __init__(self):
        self.kept = []

    def _put(self, payload):
        pages = -(-max(payload.nbytes, 1) // mmap.PAGESIZE)
        room = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(room))
        for page in (0, pages + 1):
            place = ctypes.c_void_p(first + page * mmap.PAGESIZE)
            assert libc.mprotect(place, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        at = first + (pages + 1) * mmap.PAGESIZE - payload.nbytes
        at -= at % ALIGNED
        ctypes.memmove(at, payload.ctypes.data, payload.nbytes)
        self.kept.append(room)
        return at

    def place(self, array):
        return self._put(np.ascontiguousarray(array))

    def output(self, shape, dtype):
        poison = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        at = self._put(poison)
        def read():
            return np.frombuffer(ctypes.string_at(at, len(poison)), dtype).reshape(shape)
        return at, read

calls = Calls(Path(sys.argv[1]))
ALIGNED = 16
for bits, states in ((1, 8), (2, 7), (2, 8), (3, 7), (4, 7), (5, 8), (4, 12)):
    for rows, length in ((35, 137), (16, 1100)):
        case = hyper_case(rows, length, bits=bits, states=states)
        for batch in (1, 7, 40, 260):
            dtype = ("float16", "bfloat16", "float32")[(batch + bits) % 3]
            assert product_error(calls, EdgeMemory(), case, batch, dtype) <= 1.0
        for dtype, kind in DTYPES.items():
            memory = EdgeMemory()
            w, read = memory.output((rows, length), kind)
            calls.decode(case.weight(memory.place), w, dtype)
            np.testing.assert_array_equal(read(), case.dense().astype(kind))
for kind in ("float16", "int8", "float32"):
    for rows, length, options in ((35, 137, {}), (300, 129, {"base": 1000}), (40, 1500, {})):
        case = hash_case(rows, length, slots=5, memory=kind, **options)
        for batch in (1, 3, 20):
            for dtype in ("float16", "float32"):
                assert product_error(calls, EdgeMemory(), case, batch, dtype) <= 1.0
print("inside")
"""


@pytest.mark.parametrize("capability", ["75", "80", "90"])
def test_kernels_stay_inside_their_tensors(emulated: Path, capability: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT / 'src'}",
        "ONNXCOMP_EMULATED_CAPABILITY": capability,
    }
    command = [sys.executable, "-c", PROGRAM, str(emulated)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (run.returncode, run.stdout) == (0, "inside\n"), run.stderr[-2000:]
