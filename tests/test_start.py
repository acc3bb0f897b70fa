"""What a start of the program imports: what takes long comes with the work that needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Packages that are imported for the work they do, and folders of ours of which that is true.
_HEAVY = (
    *("sympy", "onnxscript", "torch", "distributed", "asyncio", "onnxruntime"),
    *("onnxcomp.passes.encoding.cluster", "onnxcomp.passes.transforms.prune.pruning"),
)

_RUN = """
import runpy, sys
sys.argv[0] = "onnxcomp"
try:
    runpy.run_module("onnxcomp", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("modules", *sorted(sys.modules))
"""


def imported(program: str, *words: str) -> set[str]:
    """Modules that a new process has in the end."""
    made = [sys.executable, "-c", program, *words]
    done = subprocess.run(made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_imports_no_package_that_computes() -> None:
    modules = imported(_RUN, "--help")
    assert "onnxcomp.cli.app" in modules
    assert not modules & {*_HEAVY, "numpy", "onnx", "onnx_ir", "onnxcomp.cli.optimize"}


def test_a_plain_run_imports_what_it_needs(demo_model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    modules = imported(
        _RUN, "optimize", str(demo_model_path), "-o", str(out), "--bits", "4", "--no-verify"
    )
    assert out.exists() and "onnx_ir" in modules
    assert not modules & {*_HEAVY}


def test_a_worker_that_is_started_here_imports_what_it_needs() -> None:
    modules = imported(
        "import sys, onnxcomp.passes.encoding.local_worker\nprint('modules', *sys.modules)"
    )
    assert "onnxcomp.passes.encoding.cluster_tasks" in modules and "onnx_ir" in modules
    assert not modules & {"sympy", "onnxscript", "torch"}


def test_a_process_that_imports_the_library_gets_other_packages_as_they_are() -> None:
    modules = imported(
        "import sys, onnxcomp.passes.driver.api\n"
        "assert 'onnxcomp.light_imports' not in {type(x).__module__ for x in sys.meta_path}\n"
        "print('modules', *sys.modules)"
    )
    assert {"onnx_ir", "sympy"} <= modules


@pytest.mark.parametrize("first", ["onnxcomp", "sympy", "onnx_ir", "threading"])
def test_symbolic_dimensions_compute_with_the_only_sympy_there_is(first: str) -> None:
    """Whatever is imported before, also where sympy is needed on several threads at once."""
    program = f"""
import {first}
import concurrent.futures
import sys
from onnxcomp import light_imports
light_imports.install()
import onnxcomp.passes.driver.api
import onnx_ir

def computed(number):
    import sympy.core
    dim = onnx_ir.SymbolicDim("n") + number
    assert isinstance(dim._expr, sympy.Expr), type(dim._expr)
    return str(dim)

with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(computed, range(1, 9)))
assert found == [f"n + {{number}}" for number in range(1, 9)], found
import sympy
assert type(sympy).__name__ == "module" and onnx_ir._core.sympy.Symbol is sympy.Symbol
assert type(onnx_ir.__spec__.loader).__name__ == "SourceFileLoader"
print("modules", *sys.modules)
"""
    assert "sympy" in imported(program)


def test_a_sympy_that_is_missing_is_named_where_it_is_needed() -> None:
    program = """
import sys
sys.modules["sympy.core"] = None
from onnxcomp import light_imports
light_imports.install()
import onnxcomp.passes.driver.api
import onnx_ir
try:
    onnx_ir.SymbolicDim("n") + 1
except ImportError as error:
    assert "sympy.core" in str(error), error
else:
    raise SystemExit("nothing was said")
print("modules")
"""
    assert not imported(program)
