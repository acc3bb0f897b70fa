"""`python service.py`: the model in KServe's own server."""

import asyncio
import uuid
from typing import Any

import kserve
import numpy as np
from kserve.utils.numpy_codec import from_np_dtype
from model import MAX_BATCH, WAIT_SECONDS, Model


class Service(kserve.Model):
    """The Open Inference Protocol: POST /v2/models/NAME/infer; requests are joined to batches."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.model = Model()
        self.waiting: list[tuple[dict[str, np.ndarray], asyncio.Future[Any]]] = []
        self.joining: asyncio.Task[None] | None = None
        self.ready = True

    async def predict(
        self,
        payload: kserve.InferRequest,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> kserve.InferResponse:
        request = {
            value.name: value.as_numpy().astype(self.model.types[value.name])
            for value in payload.inputs
        }
        outputs = []
        for name, value in (await self.answer(request)).items():
            kind = from_np_dtype(value.dtype)
            output = kserve.InferOutput(name, list(value.shape), kind)
            output.set_data_from_numpy(value, binary_data=False)
            outputs.append(output)
        return kserve.InferResponse(payload.id or str(uuid.uuid4()), self.name, outputs)

    async def answer(self, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Wait for others, then run with those that came."""
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, result))
        if len(self.waiting) == 1:  # a task of its own: this request may be cancelled
            self.joining = asyncio.create_task(self.join())
        return await result

    async def join(self) -> None:
        """Run all requests that wait, those that nobody wants any more left out."""
        await asyncio.sleep(WAIT_SECONDS)
        waiting, self.waiting = self.waiting, []
        wanted = [item for item in waiting if not item[1].done()]
        for start in range(0, len(wanted), MAX_BATCH):
            self.run(wanted[start : start + MAX_BATCH])

    def run(self, joined: list[Any]) -> None:
        """Give each request its answer, or the error of the run."""
        try:
            answers = self.model.run([request for request, _ in joined])
        except Exception as error:
            for _, result in joined:
                result.set_exception(error)
            return
        for (_, result), answer in zip(joined, answers, strict=True):
            result.set_result(answer)


if __name__ == "__main__":
    kserve.ModelServer().start([Service("@NAME@")])
