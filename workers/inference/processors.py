"""A model folder's processor for still images: Pillow underneath, no torchvision, no video.

transformers builds a family's whole processor, and a video part needs torchvision. Chat has no videos, so that part is
left out, whether torchvision is installed or not: a picture becomes the same numbers on every machine.
"""

from typing import Any

import transformers
from transformers import AutoImageProcessor, ProcessorMixin

from api_schemas.errors import InvalidCheckpoint
from preflight.vision import has_processor
from workers.inference.registry import ModelSource

VIDEO = "video_processor"
# Its constructor wants the package num2words, which it needs for videos alone; prompts of still images are the same.
SAME_FOR_STILLS = {"SmolVLMProcessor": "Idefics3Processor"}


def load_processor(source: ModelSource, tokenizer: Any) -> Any | None:
    """Return what makes a model's inputs of text and images, or None when the folder has no file that describes it.

    Raises:
        InvalidCheckpoint: `processor_load_failed` or `processor_needs_torchvision`.
    """
    if not has_processor([path.name for path in source.folder.iterdir()]):
        return None
    try:
        image_processor = AutoImageProcessor.from_pretrained(
            source.folder, backend="pil", trust_remote_code=False, local_files_only=True
        )
        return _assemble(source, tokenizer, image_processor)
    except Exception as error:  # transformers names no common base for what a damaged folder can raise
        if "torchvision" in str(error):
            message = (
                f"the image processor of '{source.id}' exists for torchvision alone, which this server does not have; "
                "pip install torchvision beside torch, or choose another model"
            )
            raise InvalidCheckpoint("processor_needs_torchvision", message, "model") from error
        message = f"the processor of '{source.id}' cannot be loaded: {type(error).__name__}: {error}"
        raise InvalidCheckpoint("processor_load_failed", message, "model") from error


def _assemble(source: ModelSource, tokenizer: Any, image_processor: Any) -> Any:
    settings, _ = ProcessorMixin.get_processor_dict(source.folder, local_files_only=True)
    stock = _stock_class(source, settings, tokenizer)
    wanted = stock.get_attributes()
    still: Any = type(
        stock.__name__,
        (stock,),
        {"get_attributes": classmethod(lambda _: [name for name in wanted if name != VIDEO])},
    )
    parts = {"tokenizer": tokenizer, "image_processor": image_processor, VIDEO: None}
    settings = {name: value for name, value in settings.items() if name not in parts}
    return still.from_args_and_dict([parts[name] for name in wanted], settings)


def _stock_class(source: ModelSource, settings: dict[str, Any], tokenizer: Any) -> Any:
    """The class that processor_config.json, else tokenizer_config.json names, else the model type's own."""
    name = settings.get("processor_class") or tokenizer.init_kwargs.get("processor_class")
    if name is None:
        config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        name = transformers.PROCESSOR_MAPPING[type(config)].__name__
    found: Any = getattr(transformers, SAME_FOR_STILLS.get(name, name), None)
    if getattr(found, "is_dummy", False):  # how transformers stands in for what it cannot import
        raise ImportError(f"{name} needs {', '.join(found._backends)}")
    if not (isinstance(found, type) and issubclass(found, ProcessorMixin)):
        raise ValueError(f"processor_class {name!r} is no processor that transformers has")
    return found
