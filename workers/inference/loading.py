"""One model from its folder into memory, with what the token loop must know about it."""

import inspect
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import compression.runtime  # noqa: F401  (registers the layouts of compressed models with transformers)
from api_schemas.errors import InvalidCheckpoint, Unavailable
from compression.core.grid import PACKED, WORD_BITS
from compression.core.pack_quantized import packed_bits
from compression.core.packed_forms import packed_linears
from compression.core.quantized_config import is_bitsandbytes
from preflight.checkpoint import Checkpoint, open_checkpoint
from preflight.engines import OWN
from preflight.vision import loads_with_vision, searches_answers
from workers.inference.graphs import graph_bytes, load_graph
from workers.inference.precision import STORED, Precision, choose_precision, cpu_flags, stored_dtype
from workers.inference.processors import NoProcessor, load_processor
from workers.inference.registry import ModelSource
from workers.inference.sampling import SamplingDefaults
from workers.inference.tables.reading import TableReader, load_table_reader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadPlan:
    """What loading will take, known from the headers alone.

    Attributes:
        source: which model.
        precision: the number format it will have.
        bytes: what its tensors will occupy.
        packed: whether weights are stored as codes, which are unpacked while it is loaded.
        codes: whether weights are codes of bitsandbytes, and stay codes in memory.
        sees: whether it is loaded with its vision tower.
    """

    source: ModelSource
    precision: Precision
    bytes: int
    packed: bool = False
    codes: bool = False
    sees: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        source: which model.
        model: the transformers module, in evaluation mode; or a `ServedGraph`.
        tokenizer: its tokenizer.
        precision: number format and device.
        bytes: measured, of all parameters and buffers, shared storage counted once.
        seconds: that loading took.
        context_length: most tokens of prompt and answer together, or None when the model names no limit.
        vocabulary: rows of the embedding; token ids are below it.
        eos_ids: tokens that end an answer.
        defaults: sampling values from the model's generation_config.json.
        cache_argument: the name under which the model's forward takes its key-value cache.
        processor: makes inputs of text and images; None where the model reads text alone.
        no_processor: why a model with a vision tower has none.
        stops: texts that end its answers, beside those of a request.
        tables: how it is shown tables; None where it has no rule for them.
        searches: whether its answers are searched as a whole (`video_answers`) and not written token by token.
    """

    source: ModelSource
    model: Any
    tokenizer: Any
    precision: Precision
    bytes: int
    seconds: float
    context_length: int | None
    vocabulary: int
    eos_ids: frozenset[int]
    defaults: SamplingDefaults
    cache_argument: str
    processor: Any = None
    no_processor: NoProcessor | None = None
    stops: tuple[str, ...] = ()
    tables: TableReader | None = None
    searches: bool = False


def plan_load(source: ModelSource) -> LoadPlan:
    """Read a model's headers and say what loading it will take.

    Raises:
        InvalidCheckpoint: the folder is gone or damaged.
    """
    checkpoint = open_checkpoint(source.folder)
    if source.engine != OWN:
        why = f"{source.engine}: onnxruntime, on the CPU; products and cache in float32"
        precision = Precision(torch.float32, stored_dtype(_parameters_by_dtype(checkpoint)), "cpu", why)
        return LoadPlan(source, precision, graph_bytes(source))
    precision = choose_precision(
        stored_dtype(_parameters_by_dtype(checkpoint)), "cuda" if torch.cuda.is_available() else "cpu", cpu_flags()
    )
    settings = checkpoint.config.get("quantization_config")
    bits, scales = packed_bits(settings), _scales(checkpoint)
    size = sum(
        entry.parameters * WORD_BITS // bits * precision.dtype.itemsize
        if bits is not None and name.endswith(PACKED)
        else entry.parameters * precision.dtype.itemsize
        if entry.dtype in STORED and name not in scales
        else entry.bytes
        for name, entry in checkpoint.tensors.items()
    )
    sees = loads_with_vision(checkpoint.config)
    return LoadPlan(source, precision, size, packed=bits is not None, codes=is_bitsandbytes(settings), sees=sees)


def load(plan: LoadPlan) -> LoadedModel:
    """Load a model; safetensors only, no remote code, no network.

    Raises:
        InvalidCheckpoint: `model_load_failed`, `missing_weights`, `tokenizer_missing`, `processor_load_failed`,
            `invalid_table_rule`, `table_tokenizer_invalid` or `invalid_generation_config`.
        Unavailable: `out_of_memory`.
    """
    if plan.source.engine != OWN:
        return _load_graph(plan)
    start = time.monotonic()
    model = _load_weights(plan)
    tokenizer = _load_tokenizer(plan.source)
    searches = searches_answers(model.config.to_dict())
    processor = load_processor(plan.source, tokenizer) if plan.sees and not searches else None
    parameters = inspect.signature(model.forward).parameters
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return LoadedModel(
        source=plan.source,
        model=model,
        tokenizer=tokenizer,
        precision=plan.precision,
        bytes=measured_bytes(model),
        seconds=time.monotonic() - start,
        context_length=context,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        eos_ids=_eos_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None), tokenizer),
        defaults=_sampling_defaults(plan.source),
        cache_argument="cache" if "cache" in parameters else "past_key_values",
        processor=None if isinstance(processor, NoProcessor) else processor,
        no_processor=processor if isinstance(processor, NoProcessor) else None,
        stops=tuple(getattr(model.config, "stop_strings", None) or ()),
        tables=load_table_reader(plan.source, model),
        searches=searches,
    )


def _load_graph(plan: LoadPlan) -> LoadedModel:
    """Load an ONNX graph in the place of the weights; tokenizer and settings are the model's."""
    served = load_graph(plan.source)
    tokenizer = _load_tokenizer(plan.source)
    return LoadedModel(
        source=plan.source,
        model=served,
        tokenizer=tokenizer,
        precision=plan.precision,
        bytes=served.bytes,
        seconds=served.seconds,
        context_length=getattr(served.config, "max_position_embeddings", None),
        vocabulary=served.config.vocab_size,
        eos_ids=_eos_ids(served.eos_ids, tokenizer),
        defaults=_sampling_defaults(plan.source),
        cache_argument="",
    )


def measured_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers; storage that several of them share counts once.

    The scales of bitsandbytes' linears are neither, and count too.
    """
    storages = {}
    for tensor in (*model.parameters(), *model.buffers(), *_hidden_scales(model)):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _hidden_scales(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that bitsandbytes keeps as attributes beside a linear's codes."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state, fours = getattr(module, "state", None), getattr(weight, "quant_state", None)
        found = [getattr(weight, "SCB", None), getattr(state, "SCB", None), getattr(fours, "absmax", None)]
        yield from (tensor for tensor in found if isinstance(tensor, torch.Tensor))


def _load_weights(plan: LoadPlan) -> Any:
    try:
        auto_class = AutoModelForImageTextToText if plan.sees else AutoModelForCausalLM
        model, info = auto_class.from_pretrained(
            plan.source.folder,
            dtype=plan.precision.stored if plan.packed else plan.precision.dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        if plan.packed:
            _first_pass(model)
            model = torch.nn.Module.to(model, plan.precision.dtype)  # stock `.to` refuses packed models, even then
        if plan.codes:
            logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # it says on each call that it rounds
            _first_pass(model)  # what the kernels refuse, they refuse now
        model = model.to(plan.precision.device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = f"no memory left to load '{plan.source.id}' ({plan.bytes} bytes); unload others or use a smaller one"
        raise Unavailable("out_of_memory", message, "model") from error
    except Exception as error:  # transformers names no common base for what a damaged folder can raise
        message = f"model '{plan.source.id}' cannot be loaded: {type(error).__name__}: {error}"
        raise InvalidCheckpoint("model_load_failed", message, "model") from error
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:  # transformers would fill these with random numbers
        message = f"model '{plan.source.id}' lacks weights its configuration calls for: {', '.join(missing[:5])}"
        raise InvalidCheckpoint("missing_weights", message, "model")
    if info["unexpected_keys"]:
        logger.warning("%s: %d tensors have no place in the model", plan.source.id, len(info["unexpected_keys"]))
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def _first_pass(model: Any) -> None:
    """Run one token: compressed-tensors turns codes into weights, bitsandbytes into the order its kernels want."""
    model.eval()
    model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)


def _load_tokenizer(source: ModelSource) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above
        message = f"model '{source.id}' has no tokenizer that can be loaded: {type(error).__name__}: {error}"
        raise InvalidCheckpoint("tokenizer_missing", message, "model") from error


def _parameters_by_dtype(checkpoint: Checkpoint) -> Counter[str]:
    counts, scales = Counter[str](), _scales(checkpoint)
    for name, entry in checkpoint.tensors.items():
        if name not in scales:
            counts[entry.dtype] += entry.parameters
    return counts


def _scales(checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors beside bitsandbytes' codes, which are in float32 whatever the model's format is."""
    return frozenset(
        f"{linear}.{kind}"
        for linear, form in packed_linears(checkpoint.tensors).items()
        if form.marker != PACKED
        for kind in form.kinds
        if kind != "weight"
    )


def _eos_ids(configured: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
    """Generation config and tokenizer together: chat models often name their end-of-turn token in one of them only."""
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)


def _sampling_defaults(source: ModelSource) -> SamplingDefaults:
    path = source.folder / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    try:
        return SamplingDefaults.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its JSON"
        message = (
            f"generation_config.json of '{source.id}' is wrong at {where}: {first['msg']}; correct or remove the file"
        )
        raise InvalidCheckpoint("invalid_generation_config", message, "model") from error
