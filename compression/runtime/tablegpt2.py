"""TableGPT2 with its table encoder: tables become input embeddings of a Qwen2 decoder.

The decoder is an ordinary causal model made by AutoModel of `text_config`, so one with other widths per block fits in.
Positions that tables fill have the id `table_token_id` (−114, which is no token) in the prompt.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

from compression.runtime.table_encoder import CellTableEncoder
from compression.runtime.table_markup import MarkupTableEncoder

MODEL_TYPE = "modepress_tablegpt2"
TABLE_TOKEN_ID = -114
ENCODERS: dict[str, Any] = {"cells": CellTableEncoder, "markup": MarkupTableEncoder}


class TableGPT2Config(PreTrainedConfig):
    """The decoder's configuration, the encoder's sizes (`kind`: cells or markup) and the projector's depth."""

    model_type = MODEL_TYPE
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2")}  # noqa: RUF012

    text_config: Any = None
    table_encoder: dict[str, Any] | None = None
    projector_layers: int = 2
    table_token_id: int = TABLE_TOKEN_ID
    tie_word_embeddings: bool = False


class TableGPT2ForCausalLM(PreTrainedModel, GenerationMixin):
    """Qwen2 that reads text and tables."""

    config_class = TableGPT2Config
    base_model_prefix = ""
    _no_split_modules = ("Qwen2DecoderLayer",)
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        """Build decoder, encoder and projector.

        Raises:
            ValueError: `table_encoder.kind` is none that is known.
        """
        super().__init__(config)
        settings = config.table_encoder or {}
        if settings.get("kind") not in ENCODERS:
            raise ValueError(f"table_encoder.kind is {settings.get('kind')!r}; known are {', '.join(ENCODERS)}")
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.table_encoder = ENCODERS[settings["kind"]](settings)
        widths = [settings["width"], *[config.text_config.hidden_size] * config.projector_layers]
        self.projector = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """The decoder's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the decoder's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The decoder's head."""
        return self.language_model.get_output_embeddings()

    def encode_tables(self, cells: Tensor, mask: Tensor, sizes: Tensor) -> Tensor:
        """Return what tables are for the decoder, `[positions, hidden]`; arguments as of the encoder."""
        states: Tensor = self.table_encoder(cells, mask, sizes)
        for index, linear in enumerate(self.projector):
            states = linear(nn.functional.gelu(states) if index else states)
        return states

    def _embed(self, input_ids: Tensor, tables: Tensor | None) -> Tensor:
        """Token embeddings with the tables in their places.

        Raises:
            ValueError: the prompt has other places for tables than there are positions.
        """
        places = input_ids == self.config.table_token_id
        needed, given = int(places.sum()), 0 if tables is None else len(tables)
        if needed != given:
            raise ValueError(f"the prompt has places for {needed} positions of tables, and the tables have {given}")
        embedded: Tensor = self.get_input_embeddings()(input_ids.clamp(min=0))
        return embedded if tables is None else embedded.masked_scatter(places.unsqueeze(-1), tables.to(embedded.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        table_cells: Tensor | None = None,
        table_mask: Tensor | None = None,
        table_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the decoder on text and tables.

        Args:
            input_ids: `[batch, tokens]`, `table_token_id` where a table's position goes.
            attention_mask: of the decoder.
            cache: of the decoder.
            inputs_embeds: `[batch, tokens, hidden]` in place of `input_ids` and tables.
            table_cells: as of the encoder; all tables of the batch in the order of their places.
            table_mask: as of the encoder.
            table_sizes: as of the encoder.
            kwargs: for the decoder.

        Raises:
            ValueError: places and positions differ in number.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            tables = None
            if table_cells is not None and table_mask is not None and table_sizes is not None:
                tables = self.encode_tables(table_cells, table_mask, table_sizes)
            inputs_embeds = self._embed(input_ids, tables)
        output: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, cache=cache, **kwargs
        )
        return output

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any) -> Any:
        """As in stock models; tables are read once, with the prompt."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration:
            for name in ("table_cells", "table_mask", "table_sizes"):
                inputs.pop(name, None)
        return inputs


def register() -> None:
    """Make the Auto classes know it; safe to call twice."""
    AutoConfig.register(MODEL_TYPE, TableGPT2Config, exist_ok=True)
    AutoModelForCausalLM.register(TableGPT2Config, TableGPT2ForCausalLM, exist_ok=True)


def empty_model(config: TableGPT2Config) -> TableGPT2ForCausalLM:
    """The model without memory for its weights: names and shapes alone."""
    with torch.device("meta"):
        return TableGPT2ForCausalLM(config)
