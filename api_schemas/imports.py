"""What an importer is told: which published files, and what no file says."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from api_schemas.base import Frozen

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Template = Literal["human", "human_bare", "inst", "instruct", "caption"]
Place = Annotated[str, Field(min_length=1, max_length=4096)]


class Originals(Frozen):
    """Published files of one family, by the roles that they play."""

    roles: ClassVar[tuple[str, ...]] = ()

    def places(self) -> dict[str, str]:
        """The paths that are given, by role."""
        given = {role: getattr(self, role) for role in self.roles}
        return {role: str(path) for role, path in given.items() if path is not None}


class ImageChatImport(Originals):
    """What the families around EVA ViT-g and a Q-Former have in common."""

    roles: ClassVar[tuple[str, ...]] = ("language", "vision", "q_former", "delta")

    language: Annotated[Place, Field(description="folder of the language model: weights, config.json, tokenizer")]
    vision: Annotated[Place, Field(description="eva_vit_g.pth")]
    delta: Annotated[Place, Field(description="the authors' own file: what they trained")]
    template: Annotated[
        Template | None,
        Field(
            description="prompt form: human (###Human: … after a system text), human_bare (without that), inst "
            "([INST] … [/INST]), instruct (Instruct: … Output:), caption (the image alone); default: by stage"
        ),
    ] = None
    image_size: Annotated[int | None, Field(ge=1, le=4096, description="pixels; default: by family and stage")] = None
    vision_heads: Annotated[int, Field(ge=1, le=1024, description="of the ViT; no file says it")] = 16
    q_former_heads: Annotated[int, Field(ge=1, le=1024, description="of the Q-Former; no file says it")] = 12
    dtype: Annotated[Dtype, Field(description="of what is written; auto: that of most of the language model")] = "auto"


class TinyGptvImport(ImageChatImport):
    """TinyGPT-V: Phi-2, EVA ViT-g, BLIP-2's Q-Former, and a file of one training stage."""

    family: Literal["tinygptv"]
    q_former: Annotated[Place, Field(description="blip2_pretrained_flant5xxl.pth")]
    stage: Annotated[int | None, Field(ge=1, le=4, description="default: as the delta's file name says")] = None
    lora_alpha: Annotated[float, Field(gt=0, description="of the adapters; their scale is this over their rank")] = 16.0


class LlamaChatImport(ImageChatImport):
    """What MiniGPT-4 and ArtGPT-4 have in common: a LLaMA whose version matters."""

    q_former: Annotated[
        Place | None, Field(description="blip2_pretrained_flant5xxl.pth; none where patches are joined instead")
    ] = None
    accept_base: Annotated[bool, Field(description="take a language model of another version than the authors'")] = (
        False
    )


class MiniGpt4Import(LlamaChatImport):
    """MiniGPT-4 and MiniGPT-v2: Vicuna v0 with a Q-Former, or Llama 2 chat with joined patches."""

    family: Literal["minigpt4"]
    lora_alpha: Annotated[float, Field(gt=0, description="of adapters; their scale is this over their rank")] = 16.0


class ArtGpt4Import(LlamaChatImport):
    """ArtGPT-4: Vicuna 13B v0 with a bottleneck in each block."""

    family: Literal["artgpt4"]
    q_former: Annotated[Place, Field(description="blip2_pretrained_flant5xxl.pth")]


class TableGpt2Import(Originals):
    """TableGPT2: one folder, with or without its encoder."""

    roles: ClassVar[tuple[str, ...]] = ("folder",)
    family: Literal["tablegpt2"]
    folder: Annotated[Place, Field(description="as published")]


class MPlug2Import(Originals):
    """mPLUG-2: a fine-tuned checkpoint, complete in one file."""

    roles: ClassVar[tuple[str, ...]] = ("checkpoint", "bert_config", "tokenizer")
    family: Literal["mplug2"]
    checkpoint: Annotated[Place, Field(description="mPLUG2_…_Caption.pth or mPLUG2_…_QA.pth")]
    bert_config: Annotated[Place, Field(description="configs/config_bert_large_text.json of the authors' repository")]
    tokenizer: Annotated[Place, Field(description="folder with bert-large-uncased's tokenizer")]
    task: Annotated[Literal["caption", "question"], Field(description="what the checkpoint was trained for")]
    frames: Annotated[int, Field(ge=1, le=1024, description="of a clip, as it was trained; no file says it")] = 16


ImportRequest = Annotated[
    TinyGptvImport | MiniGpt4Import | ArtGpt4Import | TableGpt2Import | MPlug2Import, Field(discriminator="family")
]
