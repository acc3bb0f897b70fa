"""Lets ``python -m onnxcomp`` stand for the command ``onnxcomp``."""

from onnxcomp.cli import main

if __name__ == "__main__":
    main()
