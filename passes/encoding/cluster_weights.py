"""Weights on their way to the workers of a cluster, and what comes back."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.encoding.cluster_tasks import SMALL, Answer, FilePart, Item, Place
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.ir.tensors import MappedTensor
from onnxcomp.passes.ir.traversal import initializers
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["Weights"]

log = logging.getLogger(__name__)


class Weights:
    """The weights of one run.

    Args:
        model: The canonical model; only read.
        plan: Decisions for them.
        exchange: The folder that payloads go through.
        shared: Whether all workers see it.
    """

    def __init__(self, model: ir.Model, plan: Plan, exchange: Place, *, shared: bool) -> None:
        self._plan, self._folder, self._shared = plan, exchange.folder, shared
        self._values = initializers(model)
        self._files: dict[str, os.stat_result] = {}

    def item(self, site: WeightSite) -> Item:
        """What workers are told of a weight."""
        return Item(site, self._plan[site.name], self._stored(site))

    def _stored(self, site: WeightSite) -> FilePart | Array:
        """Where workers find a tensor: in the model's file, or in one that is written for them."""
        tensor = self._values[site.name].const_value
        assert tensor is not None
        if isinstance(tensor, MappedTensor):
            if tensor.path not in self._files:
                self._files[tensor.path] = os.stat(tensor.path)
            return FilePart.of(tensor, self._files[tensor.path])
        array = np.ascontiguousarray(tensor.numpy())
        if array.nbytes <= SMALL or not self._shared:
            return array
        path = self._sent_file(site.name)
        path.write_bytes(array.reshape(-1).view(np.uint8).data)
        mapped = MappedTensor(str(path), 0, array.nbytes, tensor.dtype, ir.Shape(array.shape))
        return FilePart.of(mapped, path.stat())

    def _sent_file(self, name: str) -> Path:
        return Path(self._folder, f"{hashlib.sha256(name.encode()).hexdigest()}.weight")

    def forget(self, name: str) -> None:
        """Remove what was written for workers of a weight."""
        self._sent_file(name).unlink(missing_ok=True)

    def kept(self, answer: Answer) -> Answer:
        """An answer that takes little memory: a large payload goes to a file."""
        try:
            return answer.packed(self._folder)
        except OSError as error:
            log.warning("payloads stay in memory: %s", error)
            return answer

    def encoded(self, site: WeightSite, answer: Answer) -> EncodedWeight:
        """A weight from what a worker has said of it; its file in the exchange is removed.

        Raises:
            CompressionError: That file is not there.
        """
        try:
            return answer.encoded(site, self._plan[site.name])
        except OSError as error:
            raise CompressionError(
                f"what a worker wrote of {site.name!r} is not in {self._folder}: {error}",
                hint="put the output into a folder that workers do not see, or look at its file "
                "system",
            ) from error
