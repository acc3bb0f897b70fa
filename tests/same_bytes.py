"""Compare what two versions of the compiler write: python tests/same_bytes.py [--base COMMIT].

For every model of a folder and every setting below, the plan and the output must be the same, byte
for byte. The base is the last commit before passes/ was moved into rooms; with other commits the
script shows whether a change that was to be one of form only was one. Both versions are built from
git in a temporary folder. Exit status 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = "6cd81f6"

SETTINGS = {
    "--bits 4": {"bits": 4},
    "--ratio 8": {"ratio": 8},
    "--method int": {"method": "int"},
    "--method lowrank --ratio 2": {"method": "lowrank", "ratio": 2},
}

# Runs in both versions: hashes of the plan and of all written files, for each model and setting.
WORKER = """
import hashlib, json, sys, tempfile
from pathlib import Path
import onnxcomp

models, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for model in models:
    for name, given in settings.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.onnx"
            try:
                result = onnxcomp.optimize(model, out, verify=False, force=True, **given)
            except onnxcomp.TargetMissedError as error:
                result = error.result
            except onnxcomp.errors.CompressionError as error:
                print(json.dumps([model, name, {"error": str(error)}]), flush=True)
                continue
            files = [result.path, *Path(folder).glob("*.data")]
            found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
            result.plan.save(Path(folder) / "plan.json")
            found["plan.json"] = hashlib.sha256(
                (Path(folder) / "plan.json").read_bytes()
            ).hexdigest()
            print(json.dumps([model, name, found]), flush=True)
"""


def checkout(commit: str, folder: Path) -> Path:
    """The files of a commit, or of the working tree where it is empty, with built libraries."""
    if commit:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit], check=True, stdout=subprocess.PIPE
        ).stdout
    else:
        listed = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(
            ["git", "-C", str(ROOT), *listed], check=True, stdout=subprocess.PIPE
        ).stdout.split(b"\0")
        present = [n for n in names if n and (ROOT / os.fsdecode(n)).exists()]
        archive = subprocess.run(
            ["tar", "-C", str(ROOT), "--null", "-T", "-", "-cf", "-"],
            input=b"\0".join(present),
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
    folder.mkdir()
    subprocess.run(["tar", "-C", str(folder), "-xf", "-"], input=archive, check=True)
    build = folder / "build"
    for command in (
        ["cmake", "-S", str(folder), "-B", str(build), "-DONNXCOMP_CUDA=OFF"],
        ["cmake", "--build", str(build), "-j2"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def library(folder: Path, name: str) -> str:
    """The one built library of that name."""
    (found,) = (folder / "build").rglob(f"libonnxcomp_{name}.so")
    return str(found)


def outputs(folder: Path, models: list[Path]) -> dict[tuple[str, str], dict[str, str]]:
    """Hashes by model and setting, of one version."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "src"),
        "ONNXCOMP_OPS_LIBRARY": library(folder, "ops"),
        "ONNXCOMP_ENCODERS_LIBRARY": library(folder, "encoders"),
    }
    arguments = [json.dumps([str(model) for model in models]), json.dumps(SETTINGS)]
    run = subprocess.run(
        [sys.executable, "-c", WORKER, *arguments],
        env=environment,
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    return {(model, name): found for model, name, found in lines}


def main() -> int:
    """Print one line for each difference, and a summary."""
    data = Path(os.environ.get("ONNXCOMP_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=BASE, help="commit to compare with")
    parser.add_argument("--head", default="", help="commit to compare; default: the working tree")
    parser.add_argument("models", nargs="*", type=Path, help="default: all of the data folder")
    given = parser.parse_args()
    models = given.models or sorted([*data.glob("models/**/*.onnx"), *data.glob("lm/*.onnx")])
    if not models:
        parser.error(f"no models in {data}: set ONNXCOMP_DATA or name some")
    with tempfile.TemporaryDirectory() as folder:
        base = outputs(checkout(given.base, Path(folder) / "base"), models)
        head = outputs(checkout(given.head, Path(folder) / "head"), models)
    differences = [key for key in base | head if base.get(key) != head.get(key)]
    for model, name in differences:
        print(f"{model} {name}: {base.get((model, name))} != {head.get((model, name))}")
    print(f"{len(models)} models, {len(base)} runs, {len(differences)} differ")
    return 1 if differences or not base else 0


if __name__ == "__main__":
    sys.exit(main())
