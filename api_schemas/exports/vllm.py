"""Settings of the vLLM export."""

from typing import Literal

from api_schemas.base import Frozen


class VllmExport(Frozen):
    """A configuration under which vLLM's own DeciLM class loads the artifact's weights; for layout `nemotron`.

    Layout `portable` needs none: vLLM loads it as it is.
    """

    format: Literal["vllm"]

    @property
    def target(self) -> str:
        """The folder inside the artifact that `--hf-config-path` names."""
        return "exports/vllm"
