"""Foreign formats that an artifact can also be written in; one config class per format."""

from typing import Annotated

from pydantic import Field

from api_schemas.exports.gguf import GgufExport
from api_schemas.exports.onnx import OnnxExport
from api_schemas.exports.vllm import VllmExport

ExportConfig = Annotated[GgufExport | OnnxExport | VllmExport, Field(discriminator="format")]
