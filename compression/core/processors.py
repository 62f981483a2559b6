"""A model folder's processor for still images: Pillow underneath, no torchvision, no video.

transformers builds a family's whole processor, and a video part needs torchvision. That part is left out, whether
torchvision is installed or not: a picture becomes the same numbers on every machine.
"""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, ProcessorMixin

VIDEO = "video_processor"
# Its constructor wants the package num2words, which it needs for videos alone; prompts of still images are the same.
SAME_FOR_STILLS = {"SmolVLMProcessor": "Idefics3Processor"}


def still_processor(folder: Path, tokenizer: Any) -> Any:
    """Build the folder's own processor of text and images without its video part.

    Raises:
        ImportError, OSError, ValueError: it needs packages that are not here, its files are absent, or they name no
            processor that transformers has.
    """
    pictures = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, local_files_only=True)
    settings, _ = ProcessorMixin.get_processor_dict(folder, local_files_only=True)
    stock = _stock_class(folder, settings, tokenizer)
    wanted = stock.get_attributes()
    still: Any = type(
        stock.__name__,
        (stock,),
        {"get_attributes": classmethod(lambda _: [name for name in wanted if name != VIDEO])},
    )
    parts = {"tokenizer": tokenizer, "image_processor": pictures, VIDEO: None}
    settings = {name: value for name, value in settings.items() if name not in parts}
    return still.from_args_and_dict([parts[name] for name in wanted], settings)


def _stock_class(folder: Path, settings: dict[str, Any], tokenizer: Any) -> Any:
    """The class that processor_config.json, else tokenizer_config.json names, else the model type's own."""
    name = settings.get("processor_class") or tokenizer.init_kwargs.get("processor_class")
    if name is None:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        name = transformers.PROCESSOR_MAPPING[type(config)].__name__
    found: Any = getattr(transformers, SAME_FOR_STILLS.get(name, name), None)
    if getattr(found, "is_dummy", False):  # how transformers stands in for what it cannot import
        raise ImportError(f"{name} needs {', '.join(found._backends)}")
    if not (isinstance(found, type) and issubclass(found, ProcessorMixin)):
        raise ValueError(f"processor_class {name!r} is no processor that transformers has")
    return found
