"""MiniGPT-4: EVA ViT-g and BLIP-2's Q-Former (or patches joined by fours) before a decoder, and what is built on it.

Image → ViT → LayerNorm → Q-Former with learned queries → one linear → as many inputs of the decoder as queries.
transformers has all of these parts for BLIP-2; its whole differs in one epsilon, and cannot be run step by step by a
caller with a cache. TinyGPT-V and ArtGPT-4 are this whole around decoders of their own (`tinygptv`, `artgpt4`).

Source: Vision-CAIR/MiniGPT-4, `minigpt4/models/{minigpt4,minigpt_v2,eva_vit,Qformer}.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2PreTrainedModel,
    Blip2QFormerModel,
    Blip2VisionModel,
    GenerationMixin,
)

LN_VISION_EPS = 1e-5  # torch's default, which the original's norm after the ViT has; the ViT's own norms have 1e-6


class MiniGpt4Config(Blip2Config):
    """BLIP-2's configuration.

    Attributes:
        patches_joined: so many patches make one input of the decoder where there is no Q-Former; 0 where there is one.
        stop_strings: texts that end an answer.
    """

    model_type = "minigpt4"
    patches_joined: int = 0
    stop_strings: list[str] | None = None


class MiniGpt4ForConditionalGeneration(Blip2PreTrainedModel, GenerationMixin):
    """ViT, Q-Former or joined patches, one projection, and the decoder of `text_config`."""

    config_class = MiniGpt4Config
    config: Any
    main_input_name = "input_ids"

    def __init__(self, config: Any) -> None:
        """Build all parts without weights of their own choice."""
        super().__init__(config)
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.vision_model.post_layernorm.eps = LN_VISION_EPS
        width = config.vision_config.hidden_size * config.patches_joined
        if not config.patches_joined:
            width = config.qformer_config.hidden_size
            self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
            self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.language_projection = nn.Linear(width, config.text_config.hidden_size)
        self.language_model: Any = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's."""
        found: nn.Module = self.language_model.get_input_embeddings()
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the decoder's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's head."""
        found: nn.Module = self.language_model.get_output_embeddings()
        return found

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the decoder's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def image_inputs(self, pixel_values: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            pixel_values: `[images, 3, size, size]`, normalised.

        Returns:
            `[images, inputs per image, hidden]`, as the decoder reads them.
        """
        seen = self.vision_model(pixel_values=pixel_values.to(self.vision_model.dtype)).last_hidden_state
        joined = self.config.patches_joined
        if joined:
            patches = seen[:, 1:]
            told = patches.reshape(len(patches), -1, joined * patches.shape[-1])
        else:
            queries = self.query_tokens.expand(len(seen), -1, -1)
            told = self.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        projected: Tensor = self.language_projection(told.to(self.language_projection.weight.dtype))
        return projected

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder on token ids `[batch, tokens]` with pictures in the places of `image_token_id`.

        Raises:
            ValueError: there are more or fewer such places than the pictures fill.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, which say where the pictures stand")
            pictures = self.image_inputs(pixel_values).to(inputs_embeds.dtype).flatten(0, 1)
            places = input_ids == self.config.image_token_id
            if int(places.sum()) != len(pictures):
                raise ValueError(f"{int(places.sum())} places for images, and {len(pictures)} inputs of images")
            inputs_embeds = inputs_embeds.masked_scatter(places.unsqueeze(-1), pictures)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


def register_whole(config: type[Any], model: type[Any]) -> None:
    """Make the Auto classes know one of these models; safe to call twice."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def register() -> None:
    """Make the Auto classes know MiniGPT-4; safe to call twice."""
    register_whole(MiniGpt4Config, MiniGpt4ForConditionalGeneration)
