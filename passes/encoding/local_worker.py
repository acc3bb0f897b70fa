"""What a worker that is started here imports before its first task."""

from onnxcomp import light_imports

light_imports.install()

from onnxcomp.passes.encoding import cluster_tasks  # noqa: E402, F401
