"""Environments of other packages, filled by pip or npm; onnxcomp is not among them."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

__all__ = ["InstallError", "installed", "installed_by_npm", "own_variables", "version_of"]


class InstallError(Exception):
    """Something cannot be installed; the message is the end of what the installer said."""


def installed(place: Path, *installs: Sequence[str]) -> Path:
    """The interpreter of an environment, made anew unless it was made for the same words.

    Args:
        place: Its folder.
        installs: Words for `pip install`, one call after the other.

    Raises:
        InstallError: A package cannot be installed.
    """
    python, done = place / "bin" / "python", place / "installed.json"
    wanted = json.dumps(installs)
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        venv.create(place, clear=True, symlinks=True, with_pip=True)
        for words in installs:
            command = [str(python), "-m", "pip", "install", "--quiet", *words]
            run = subprocess.run(
                command, capture_output=True, text=True, check=False, env=own_variables(python)
            )
            if run.returncode:
                raise InstallError(f"{place.name} does not install: {run.stderr.strip()[-300:]}")
        done.write_text(wanted, encoding="utf-8")
    return python


def installed_by_npm(place: Path, package: str) -> str:
    """Install a package of npm where it is not yet, without scripts of it, and return its version.

    Raises:
        InstallError: It cannot be installed.
    """
    about = place / "node_modules" / package / "package.json"
    if not about.is_file():
        place.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--ignore-scripts", "--prefix", str(place), package]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = str(getattr(error, "stderr", None) or error).strip()
            raise InstallError(f"{package} does not install: {said[-300:]}") from error
    version: str = json.loads(about.read_text(encoding="utf-8"))["version"]
    return version


def own_variables(python: Path | None = None) -> dict[str, str]:
    """Variables without the path for packages, which would count as installed.

    Args:
        python: Its programs come first: some packages start pip, or others of their programs.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python is not None:
        kept["PATH"] = f"{python.parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept


def version_of(python: Path, package: str) -> str:
    """Version of a package that is installed there."""
    program = f"from importlib.metadata import version; print(version({package!r}))"
    run = subprocess.run(
        [python, "-c", program], check=True, capture_output=True, text=True, env=own_variables()
    )
    return run.stdout.strip()
