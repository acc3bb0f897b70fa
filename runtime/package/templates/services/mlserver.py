"""`mlserver start .`: the model in MLServer, which joins requests to batches itself."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from model import Model


class Service(MLModel):
    """The Open Inference Protocol: POST /v2/models/NAME/infer."""

    async def load(self) -> bool:
        self.model = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        request = {
            value.name: NumpyCodec.decode_input(value).astype(self.model.types[value.name])
            for value in payload.inputs
        }
        (answer,) = self.model.run([request])
        outputs = [NumpyCodec.encode_output(name, value) for name, value in answer.items()]
        return InferenceResponse(model_name=self.name, outputs=outputs)
