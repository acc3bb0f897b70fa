"""`serve run service:app`: the model in Ray Serve."""

from typing import Any

from model import MAX_BATCH, WAIT_SECONDS, Model
from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=4 * MAX_BATCH)
class Service:
    """POST / with {"inputs": {name: nested lists}}; requests are joined to batches."""

    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_SECONDS)
    async def answer(self, inputs: list[Any]) -> list[Any]:
        return self.model.run_lists(inputs)

    async def __call__(self, request: Request) -> dict[str, Any]:
        return {"outputs": await self.answer((await request.json())["inputs"])}

    def check_health(self) -> None:
        self.model.session.get_inputs()


app = Service.bind()
