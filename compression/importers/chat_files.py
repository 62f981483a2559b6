"""What a model needs beside its weights to chat about pictures: tokenizer with a mark, processor, template, stops.

The families here cut their prompts at the text `<ImageHere>`, tokenise the pieces apart and put the picture's inputs
between. A token of that name does the same: tokenizers cut at such tokens first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from api_schemas.errors import InvalidCheckpoint
from compression.importers.writing import write_json
from preflight.tokenizer_files import read_tokenizer

MARK = "<ImageHere>"
STOP = "###"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
# The pieces of a message, joined by single spaces as the authors' own chat joins them.
_SAID = (
    "{%- macro said(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- set ns = namespace(pieces=[]) -%}{%- for part in content -%}"
    "{%- set ns.pieces = ns.pieces + ['OPEN MARK CLOSE' if part.type == 'image' else part.text] -%}"
    "{%- endfor -%}{{ ns.pieces | join(' ') }}{%- endif -%}{%- endmacro -%}"
)
_TURNS = (
    "{%- for message in messages -%}{%- if message.role == 'user' -%}USER"
    "{%- elif message.role == 'assistant' -%}ASSISTANT{%- elif not (message.role == 'system' and loop.first) -%}"
    "{{ raise_exception('roles are system (first), user and assistant') }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ANSWER' }}{%- endif -%}"
)
_FIRST = "{%- if messages[0].role == 'system' -%}{{ said(messages[0].content) }}{%- else -%}{{ 'SYSTEM' }}{%- endif -%}"


def _turns(user: tuple[str, str], assistant: tuple[str, str], answer: str) -> str:
    texts = {"USER": user, "ASSISTANT": assistant}
    made = _TURNS
    for word, (before, after) in texts.items():
        piece = f"{{{{ '{before}' }}}}{{{{ said(message.content) }}}}{{{{ '{after}' }}}}"
        made = made.replace(word + "{%", piece + "{%")
    return made.replace("ANSWER", answer)


def _human(system: str) -> str:
    before = _SAID + _FIRST.replace("SYSTEM", system)
    return before + "{{ '###' }}" + _turns(("Human: ", STOP), ("Assistant: ", STOP), "Assistant: ")


TEMPLATES: Mapping[str, str] = {
    "human": _human(SYSTEM),
    "human_bare": _human(""),
    "inst": _SAID + _FIRST.replace("SYSTEM", "") + _turns(("[INST] ", " [/INST]"), ("", ""), ""),
    "instruct": _SAID + _FIRST.replace("SYSTEM", "") + _turns(("Instruct: ", " /n "), ("Output: ", " /n "), "Output: "),
    "caption": "{{ bos_token }}" + _SAID + _FIRST.replace("SYSTEM", "") + _turns(("", ""), ("", ""), ""),
}
BARE_MARKS = ("caption",)  # the picture without `<Img>` around it


def template(name: str, mark: str = MARK) -> str:
    """A chat template by its name, with the model's own mark for pictures."""
    opened, closed = ("", "") if name in BARE_MARKS else ("<Img>", "</Img>")
    return TEMPLATES[name].replace("OPEN MARK CLOSE", f"{opened}{mark}{closed}")


@dataclass(frozen=True)
class ChatTokens:
    """Ids that the model's configuration must know.

    Attributes:
        image: stands for one input of a picture.
        ends: end an answer.
        padding: or None.
        begin: or None.
    """

    image: int
    ends: tuple[int, ...]
    padding: int | None
    begin: int | None


def write_chat_files(
    folder: Path, language: Path, template_name: str, vocabulary: int, image_size: int, inputs_per_image: int
) -> ChatTokens:
    """Write tokenizer, template, processor and generation settings into `folder`.

    Args:
        folder: of the new model.
        language: folder of the language model, with its tokenizer.
        template_name: one of `TEMPLATES`.
        vocabulary: rows of the embedding; a mark must have one, though it is never read.
        image_size: in pixels.
        inputs_per_image: how many inputs of the decoder a picture becomes.

    Raises:
        InvalidCheckpoint: `tokenizer_missing`; `no_image_token` where the embedding has no row to spare.
    """
    tokenizer = _tokenizer(language)
    if len(tokenizer) < vocabulary:
        tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
        mark = MARK
    elif tokenizer.unk_token not in (
        None,
        tokenizer.bos_token,
        tokenizer.eos_token,
    ):  # a sentencepiece of bytes never makes it of a text
        mark = tokenizer.unk_token
    else:
        message = (
            f"the tokenizer in {language.name} has {len(tokenizer)} tokens, all rows of the embedding ({vocabulary}), "
            "and none for unknown text: there is no token to stand for a picture"
        )
        raise InvalidCheckpoint("no_image_token", message, "language")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template(template_name, mark)
    tokenizer.save_pretrained(folder)
    _write_processor(folder, mark, image_size, inputs_per_image)
    stop = tokenizer(STOP, add_special_tokens=False)["input_ids"]
    ends = [tokenizer.eos_token_id, *(stop if len(stop) == 1 else ())]
    tokens = ChatTokens(
        tokenizer.convert_tokens_to_ids(mark),
        tuple(dict.fromkeys(token for token in ends if token is not None)),
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
    )
    settings = {"eos_token_id": list(tokens.ends), "pad_token_id": tokens.padding, "bos_token_id": tokens.begin}
    write_json(folder / "generation_config.json", {key: value for key, value in settings.items() if value is not None})
    return tokens


def _tokenizer(language: Path) -> Any:
    files = tuple(path.name for path in language.iterdir() if path.is_file())
    if not read_tokenizer(language, files).present:  # transformers would make an empty one of the model's type
        message = f"language: {language.name} has no tokenizer; give the complete folder of the language model"
        raise InvalidCheckpoint("tokenizer_missing", message, "language")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(str(language), trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, ImportError) as error:
        first = str(error).strip().splitlines()[:1]
        message = f"language: {language.name} has no tokenizer that can be loaded ({first}); give the complete folder"
        raise InvalidCheckpoint("tokenizer_missing", message, "language") from error
    finally:
        logging.set_verbosity(level)


def _write_processor(folder: Path, mark: str, image_size: int, inputs_per_image: int) -> None:
    """Exactly `image_size` square, bicubic, aspect not kept; LLaVA's processor puts the marks in.

    LLaVA's counts patches: one patch as large as the image, and the others as additional ones.
    """
    pictures = {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": image_size, "width": image_size},
        "resample": 3,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    marks = {
        "processor_class": "LlavaProcessor",
        "image_token": mark,
        "patch_size": image_size,
        "num_additional_image_tokens": inputs_per_image - 1,
        "vision_feature_select_strategy": "full",
    }
    write_json(folder / "preprocessor_config.json", {**pictures, "processor_class": "LlavaProcessor"})
    write_json(folder / "processor_config.json", marks)
