"""`bentoml serve service:Service`: the model in BentoML."""

from typing import Any

import bentoml
from model import MAX_BATCH, Model


@bentoml.service(traffic={"timeout": 60})
class Service:
    """POST /predict with {"requests": [{name: nested lists}]}; requests are joined to batches."""

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=10000)
    def predict(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.model.run_lists(requests)
