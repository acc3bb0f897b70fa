"""The command line: parses options, calls the Python API, prints what it returns.

`main` is the entry point of the console script. Commands live in one file each and are imported
only when they run, so that `onnxcomp --help` starts quickly.
"""

from onnxcomp.cli.app import main

__all__ = ["main"]
