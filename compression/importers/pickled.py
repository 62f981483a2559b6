"""Reads the `.pth` and `.bin` files that authors publish, without ever running what is in them.

Such a file is a pickle, and a pickle is a program. Before torch sees one, every name it would look up is read off its
opcodes and compared with a list: tensors and their storages, plus what authors keep beside the weights (options,
configurations, numpy numbers), which become inert values whose content nobody reads. Then torch's own restricted reader
runs (`weights_only=True`), with the file mapped: a tensor's bytes are read when that tensor is.
"""

import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from api_schemas.errors import InvalidCheckpoint
from preflight.strict_json import shown, shown_list

ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"
MAX_PROGRAM_BYTES = 256 * 1024**2  # of the pickle itself; tensors lie outside it
MAX_LEGACY_BYTES = 4 * 1024**3  # the format before torch 1.6 cannot be mapped: all of it is in memory
LEGACY_PICKLES = 5  # magic, protocol, system, object, storage keys
WRAPPERS = ("model", "module", "state_dict", "model_state_dict")
# What stands beside the weights in published files, and the rule by which it is left behind.
BESIDE: Mapping[str, str] = {
    **dict.fromkeys(("optimizer", "optimizer_state", "optimizer_state_dict", "optim"), "optimizer_state"),
    **dict.fromkeys(("scaler", "amp", "lr_scheduler", "scheduler", "ds_config", "ds_version"), "training_state"),
    **dict.fromkeys(
        ("epoch", "step", "global_steps", "global_samples", "skipped_steps", "iteration"), "training_state"
    ),
    **dict.fromkeys(("dp_world_size", "mp_world_size", "sparse_tensor_module_names"), "training_state"),
    **dict.fromkeys(("buffer_names", "param_shapes", "frozen_param_shapes", "shared_params"), "training_state"),
    **dict.fromkeys(("frozen_param_fragments", "csr_tensor_module_names", "rng_state", "best_score"), "training_state"),
    **dict.fromkeys(("config", "args", "cfg", "hyper_parameters", "max_epoch", "lr"), "author_settings"),
}
_TORCH = (
    ("collections", ("OrderedDict",)),
    ("torch._utils", ("_rebuild_tensor_v2", "_rebuild_parameter")),
    ("torch", tuple(f"{kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short"))),
    ("torch", ("ByteStorage", "CharStorage", "BoolStorage", "Size", "float16", "bfloat16", "float32", "float64")),
    ("_codecs", ("encode",)),
)
_INERT = (
    ("argparse", ("Namespace",)),
    ("types", ("SimpleNamespace",)),
    ("typing", ("Any", "Union", "Dict", "List")),
    ("pathlib", ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    ("datetime", ("datetime", "timedelta")),
    ("numpy", ("dtype", "ndarray")),
    ("numpy.core.multiarray", ("scalar", "_reconstruct")),
    ("numpy._core.multiarray", ("scalar", "_reconstruct")),
    ("numpy.dtypes", ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")),
    ("omegaconf.dictconfig", ("DictConfig",)),
    ("omegaconf.listconfig", ("ListConfig",)),
    ("omegaconf.base", ("ContainerMetadata", "Metadata", "SCMode")),
    ("omegaconf.nodes", ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode")),
    ("deepspeed.runtime.fp16.loss_scaler", ("LossScaler", "DynamicLossScaler")),
    ("deepspeed.runtime.zero.config", ("ZeroStageEnum",)),
    ("deepspeed.utils.tensor_fragment", ("fragment_address",)),
)
INERT = frozenset(f"{module}.{name}" for module, names in _INERT for name in names)
ALLOWED = INERT | {f"{module}.{name}" for module, names in _TORCH for name in names}
_LOOKS_UP = {"GLOBAL", "INST"}
_REFUSED = {"STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "OBJ", "INST", "NEXT_BUFFER", "PERSID"}


class Inert:
    """Stands where a file has an object of the author's: it takes whatever it is given and holds nothing."""

    def __new__(cls, *_: object) -> "Inert":
        """Make one, whatever the original's constructor asked for."""
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        """Take nothing."""

    def __setstate__(self, state: object) -> None:
        """Drop the original's attributes."""


@dataclass(frozen=True)
class Pickled:
    """What one file holds.

    Attributes:
        tensors: by name, mapped; the name is that in the file, without `stripped`.
        beside: what stands beside the weights: its name in the file, by which rule it is left, and its bytes.
        stripped: a prefix that every name had, `module.` of data-parallel training.
    """

    tensors: dict[str, Tensor]
    beside: dict[str, tuple[str, int]]
    stripped: str = ""


def read_pickle(path: Path, beside: Mapping[str, str] = BESIDE) -> Pickled:
    """Open a file of weights; nothing in it runs, and no tensor is read yet (but for files from before torch 1.6).

    Args:
        path: a `.pth`, `.pt` or `.bin` file.
        beside: names that may stand beside the weights, each with the rule by which it is left behind.

    Raises:
        InvalidCheckpoint: `truncated_file`, `not_a_checkpoint`, `torchscript_archive`, `unsafe_pickle` (it names
            something that is neither a tensor nor on the list), `invalid_pickle`, `pickle_too_large`, `no_weights`,
            `unexpected_entry` (beside the weights) or `not_a_tensor`; `param` is the file's name, or the entry.
    """
    mapped = _check_file(path)
    names: list[Any] = [(Inert, name) for name in sorted(INERT)]
    try:
        with torch.serialization.safe_globals(names):
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise _invalid(path, f"cannot be read ({_first_line(error)})") from error
    except Exception as error:  # pickle.UnpicklingError, by its base: what torch's restricted reader refuses
        if type(error).__name__ != "UnpicklingError":
            raise
        raise _invalid(path, f"asks for what no file of weights needs ({_first_line(error)})") from error
    return _unwrapped(path, content, beside)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _invalid(path: Path, what: str) -> InvalidCheckpoint:
    return InvalidCheckpoint("invalid_pickle", f"{path.name} {what}; download it again", path.name)


def _check_file(path: Path) -> bool:
    """Look at a file from outside; return whether it can be mapped."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == ZIP:
        _check_archive(path)
        return True
    if not start.startswith(PICKLE):
        raise InvalidCheckpoint(
            "not_a_checkpoint",
            f"{path.name} begins with {start!r}: neither a zip archive nor a pickle of torch.save (a web page or a "
            "pointer of Git LFS, perhaps); download the file itself",
            path.name,
        )
    size = path.stat().st_size
    if size > MAX_LEGACY_BYTES:
        raise InvalidCheckpoint(
            "pickle_too_large",
            f"{path.name} is in the format before torch 1.6 and has {size} bytes; more than {MAX_LEGACY_BYTES} of that "
            "are not read into memory: save it again with a newer torch, or as safetensors",
            path.name,
        )
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):
            _check_program(path, file)
    return False


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise _invalid(path, "is a compressed archive, which torch.save never writes")
            inner = {entry.filename.partition("/")[2]: entry for entry in entries}
            if len(inner) < len(entries):
                raise _invalid(path, "has two entries of one name")
            if "constants.pkl" in inner:
                raise InvalidCheckpoint(
                    "torchscript_archive",
                    f"{path.name} is a TorchScript archive, a program with weights; save its state_dict() with torch "
                    "and give that file",
                    path.name,
                )
            if "data.pkl" not in inner:
                raise _invalid(path, "is a zip archive without data.pkl")
            if inner["data.pkl"].file_size > MAX_PROGRAM_BYTES:
                raise _invalid(path, f"has a pickle of {inner['data.pkl'].file_size} bytes")
            with archive.open(inner["data.pkl"]) as file:
                _check_program(path, file)
    except zipfile.BadZipFile as error:
        raise InvalidCheckpoint(
            "truncated_file",
            f"{path.name} has {path.stat().st_size} bytes and no end: its upload or download was cut off; fetch it "
            f"again ({error})",
            path.name,
        ) from error


def _check_program(path: Path, file: IO[bytes]) -> None:
    """Read a pickle's opcodes and refuse every name that is not on the list, without carrying out one of them."""
    unknown: set[str] = set()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in _LOOKS_UP:
                name = str(argument).replace(" ", ".")
                if name not in ALLOWED:
                    unknown.add(name)
            if opcode.name in _REFUSED:
                unknown.add(f"opcode {opcode.name}")
    except (ValueError, UnicodeDecodeError, OverflowError, EOFError) as error:
        raise InvalidCheckpoint(
            "truncated_file", f"{path.name}: its pickle breaks off ({error}); fetch the file again", path.name
        ) from error
    if unknown:
        raise InvalidCheckpoint(
            "unsafe_pickle",
            f"{path.name} would run {shown_list(sorted(unknown))} when it is loaded, which is neither a tensor nor a "
            "known setting of its authors; nothing was run: save the weights alone (state_dict), or as safetensors",
            path.name,
        )


def _unwrapped(path: Path, content: Any, beside: Mapping[str, str]) -> Pickled:
    """The weights of a file, whichever way its author wrapped them."""
    if not isinstance(content, Mapping):
        raise InvalidCheckpoint("no_weights", f"{path.name} holds a {type(content).__name__}, no weights", path.name)
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    weights = content if wrapper is None else content[wrapper]
    left: dict[str, tuple[str, int]] = {}
    for name, value in content.items() if wrapper is not None else ():
        if name == wrapper:
            continue
        if name not in beside:
            raise InvalidCheckpoint(
                "unexpected_entry",
                f"{path.name}: beside {wrapper!r} stands {shown(name)}, and no rule says what it is",
                str(name),
            )
        left[name] = (beside[name], _bytes(value))
    if not weights:
        raise InvalidCheckpoint("no_weights", f"{path.name} holds no tensor", path.name)
    for name, value in weights.items():
        _check_weight(path, name, value)
    stripped = "module." if all(name.startswith("module.") for name in weights) else ""
    tensors = {name.removeprefix(stripped): value.detach() for name, value in weights.items()}
    return Pickled(tensors, left, stripped)


def _check_weight(path: Path, name: Any, value: Any) -> None:
    if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
        raise InvalidCheckpoint(
            "not_a_tensor",
            f"{path.name}: {shown(name)} is a {type(value).__name__}, not a tensor; give the file of weights",
            str(name),
        )
    stored = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > stored:  # one number said a billion times
        raise InvalidCheckpoint(
            "invalid_pickle",
            f"{path.name}: {shown(name)} is {list(value.shape)} of {stored} stored bytes; save it again, whole",
            name,
        )


def _bytes(value: Any) -> int:
    """Bytes of all tensors inside a value, however deep."""
    pending, total = [value], 0
    seen: set[int] = set()  # a list may hold another twice, and that one likewise: few bytes, endless paths
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, Tensor):
            total += current.numel() * current.element_size()
        elif isinstance(current, Mapping):
            pending.extend(current.values())
        elif isinstance(current, list | tuple):
            pending.extend(current)
    return total
