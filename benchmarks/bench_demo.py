"""The demo model at 6 to 1 bits: bytes and accuracy on the held-out characters.

python benchmarks/bench_demo.py
"""

from __future__ import annotations

import json
import subprocess
import sys

from results import print_table, write_results


def main() -> None:
    """Run the demo at every number of bits, print the table, write the JSON."""
    runs = []
    for bits in (6, 5, 4, 3, 2, 1):
        command = [sys.executable, "-m", "onnxcomp", "demo", "--bits", str(bits), "--json", "-q"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        document = json.loads(run.stdout)
        bytes_by_form = {form["form"]: form["file_bytes"] for form in document["forms"]}
        runs.append(
            {
                "bits": bits,
                "bytes_before": bytes_by_form["standard"],
                "bytes_after": bytes_by_form["library"],
                "ratio": document["ratio"],
                "accuracy": {form["form"]: form["accuracy"] for form in document["forms"]},
            }
        )
    rows = [
        (
            run["bits"],
            f"{run['bytes_after'] / 1000:.1f} KB",
            f"{run['ratio']:.2f}",
            *(f"{100 * share:.2f} %" for share in run["accuracy"].values()),
        )
        for run in runs
    ]
    print_table(("bits", "file", "ratio", "original", "library", "portable"), rows)
    print(write_results("demo", {"runs": runs}))


if __name__ == "__main__":
    main()
