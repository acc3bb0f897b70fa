"""The compressed weights of a model, as weights of the dense one."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.ir.manifest import ManifestEntry, read_manifest

__all__ = ["check_match", "compressed_records"]


def compressed_records(model: ir.Model) -> dict[str, ManifestEntry]:
    """What was done with each weight that is not stored as it was; empty for a dense model."""
    return {name: r for name, r in read_manifest(model).items() if r.recipe.codec != "dense"}


def check_match(records: Mapping[str, ManifestEntry], prepared: Prepared, hint: str) -> None:
    """Check that compressed weights are weights of a dense model.

    Args:
        records: The compressed weights.
        prepared: The dense model.
        hint: What to do where they are not.

    Raises:
        ModelError: A weight is not in the dense model, or has another shape there.
    """
    sites = {site.name: site for site in prepared.sites}
    for name, record in records.items():
        if name not in sites or sites[name].shape != record.site.shape:
            raise ModelError(
                f"the compressed weight {name!r} does not match a weight of the original", hint=hint
            )
