"""`python service.py`: the model in LitServe."""

import os
from typing import Any

import litserve
from model import MAX_BATCH, WAIT_SECONDS, Model


class Service(litserve.LitAPI):
    """POST /predict with {"inputs": {name: nested lists}}; requests are joined to batches."""

    def setup(self, device: str) -> None:
        self.model = Model()

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = request["inputs"]
        return inputs

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, inputs: list[Any]) -> list[Any]:
        return self.model.run_lists(inputs)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return {"outputs": output}


if __name__ == "__main__":
    service = Service(max_batch_size=max(2, MAX_BATCH), batch_timeout=WAIT_SECONDS)
    server = litserve.LitServer(service, accelerator="cpu", workers_per_device=1)
    host, port = os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "8000"))
    server.run(host=host, port=port, generate_client_file=False)
