"""What pruning could take out of a model, as plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune.cost import Ledger, measure
from onnxcomp.passes.transforms.prune.examine import examine

__all__ = ["list_groups"]


def list_groups(path: Path) -> dict[str, Any]:
    """Groups of channels of a model that pruning may shrink, and why others stay.

    The model runs once or twice on made-up inputs, which is how sizes become known.

    Raises:
        ModelError: The file is not a model, or ONNX Runtime cannot run it.
        UsageError: The model refuses all inputs made up for it.
    """
    model = load(path)
    canonicalize(model)
    examined = examine(model)
    analysis, groups = examined.analysis, examined.groups
    ledger = Ledger(analysis, groups)
    found = [
        {
            "name": group.name,
            "kind": group.kind,
            "size": group.size,
            "slots": len(group.slots),
            "parameters": round(ledger.cost(own for slot in group.slots for own in slot[0])),
            "weights": list(group.weights),
        }
        for group in groups.groups
    ]
    return {
        "groups": found,
        "kept": [{"name": name, "reason": reason} for name, reason in groups.kept],
        "parameters": int(ledger.whole),
        "cost": measure(model, analysis.seen).to_json(),
    }
