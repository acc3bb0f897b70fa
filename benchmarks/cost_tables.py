"""The costs of products on this machine, for plans of its class that are made elsewhere.

    cost_tables.py                                  on a machine of the class, AVX-512 for example
    mask_cpuid/masked.py cost_tables.py             the class AVX2, on a machine with more

Writes passes/latency/tables/<class>.json; takes a minute or two. `bench --costs` measures the same
for the user's own machine.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench_matmul import cpu_name

from onnxcomp.passes.latency.cost_table import measure_costs
from onnxcomp.runtime.machine import current_isa, look, target_of

TABLES = Path(__file__).resolve().parents[1] / "passes" / "latency" / "tables"


def main() -> None:
    target = target_of(current_isa(look()))
    if target is None:
        raise SystemExit("no kernels are fast on this machine")
    table = measure_costs(lambda key, done, total: print(f"{key}, {done} of {total}"), save=False)
    found = table.to_json()
    found["machine"] = {
        "processor": cpu_name(),
        "isa": table.machine["isa"],
        "onnxruntime": table.machine["onnxruntime"],
    }
    found["coefficients"] = {
        key: [float(f"{value:.5g}") for value in values]
        for key, values in table.coefficients.items()
    }
    path = TABLES / f"{target}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
