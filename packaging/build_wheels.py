"""Build the wheels of onnxcomp and of the plugin execution provider, with one binary in both.

    python packaging/build_wheels.py [--outdir dist]

Needs the package `build`. The second build finds the library of the first, and compiles nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECTS = (ROOT, ROOT / "packaging" / "onnxruntime-ep-onnxcomp")


def main() -> None:
    """Build both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist", metavar="FOLDER")
    parser.add_argument(
        "--no-isolation", action="store_true", help="Build with the packages of this environment."
    )
    options = parser.parse_args()
    words = ["--no-isolation"] if options.no_isolation else []
    for project in PROJECTS:
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(options.outdir)]
        subprocess.run([*command, *words, str(project)], check=True)
    for path in sorted(options.outdir.glob("*.whl")):
        print(path)


if __name__ == "__main__":
    main()
