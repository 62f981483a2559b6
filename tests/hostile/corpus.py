"""Hostile files, made by code: each says which door it is brought to and by what name it must be refused."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "executed-by-a-pickle"
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One hostile thing.

    Attributes:
        name: says what it tries.
        door: which function of ours it is brought to (`tests.hostile.doors`).
        make: writes it below an empty folder and returns the path that is brought to the door.
        codes: it must be refused by one of these.
    """

    name: str
    door: str
    make: Callable[[Path], Path]
    codes: tuple[str, ...]


class Malice:
    """Unpickled anywhere, it leaves a file where the process stands."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


def _safetensors(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + body


def _tensor(start: int = 0, end: int = 4, shape: object = (1,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SOUND = _safetensors({"a": _tensor()}, b"\0" * 4)


def _folder(name: str = "model.safetensors", content: bytes = SOUND, **config: object) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        folder = place / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
        (folder / "model.safetensors").write_bytes(SOUND)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return folder

    return make


def _file(content: bytes, name: str = "weights.pth", size: int | None = None) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        path = place / name
        path.write_bytes(content)
        if size is not None:
            os.truncate(path, size)  # a hole: it takes no disk
        return path

    return make


def _linked(link: str, target: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        folder = _folder()(place)
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(target)
        return folder

    return make


def _pipe(place: Path) -> Path:
    folder = _folder()(place)
    os.mkfifo(folder / "vocab.json")
    return folder


def _maze(place: Path) -> Path:
    folder = _folder()(place)
    (folder / "/".join("abcdefghijklmnop")).mkdir(parents=True)
    return folder


def _crowd(place: Path) -> Path:
    folder = _folder()(place)
    for number in range(10_001):
        (folder / f"{number}.txt").touch()
    return folder


def _zip(entries: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return target.getvalue()


def _tar(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        archive.addfile(member, io.BytesIO())
    return target.getvalue()


def _numpy_objects() -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickle.dumps(Malice())


EVIL = [pickle.dumps(Malice(), protocol) for protocol in range(6)]
INST = b"(S'touch " + MARKER.encode() + b"'\nios\nsystem\n."


def _pickled_lists(depth: int) -> bytes:
    """`{"model": {}, "args": x}` where each x is a list of the former one, twice: small, and endless to walk."""
    inner: list[object] = []
    for _ in range(depth):
        inner = [inner, inner]
    return pickle.dumps({"model": {}, "args": inner}, 2)


def _torch_zip(program: bytes, storage: bytes = b"\0" * 4) -> bytes:
    return _zip({"m/data.pkl": program, "m/data/0": storage, "m/version": b"3\n", "m/byteorder": b"little"})


def _torch_view(shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A dict with one tensor of any shape and stride over a storage of one number, as torch.save would write it."""
    numbers = lambda values: b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"  # noqa: E731
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value  # noqa: E731
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x01tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + numbers(shape) + numbers(stride)
    tensor += b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text(b"w") + tensor + b"s."


def _png(width: int, height: int, rows: int | None = None) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compress(b"\0" * ((width + 7) // 8 + 1) * (height if rows is None else rows), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def gguf_file(keys: int = 0, tensors: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_array(kind: int, length: int, data: bytes = b"") -> bytes:
    return gguf_text(b"a") + struct.pack("<IIQ", 9, kind, length) + data


def _gguf_nested(depth: int) -> bytes:
    return gguf_text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0)


def gguf_tensor(dims: tuple[int, ...], count: int | None = None, kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack("<I", len(dims) if count is None else count) + struct.pack(f"<{len(dims)}Q", *dims)
    return gguf_text(b"token_embd.weight") + shape + struct.pack("<IQ", kind, offset)


def _cases(door: str, codes: str, rows: dict[str, Callable[[Path], Path]]) -> list[Case]:
    return [Case(name, door, make, tuple(codes.split())) for name, make in rows.items()]


CASES: list[Case] = [
    *_cases("checkpoint", "pickle_refused", {
        **{f"pickle protocol {number} named as weights": _folder(content=data) for number, data in enumerate(EVIL)},
        "pickle in a readme": _folder("README.md", EVIL[4]),
        "pickle in a tokenizer": _folder("tokenizer.model", EVIL[2]),
        "pickle by its name alone": _folder("pytorch_model.bin", b"harmless"),
        "pickle in capitals": _folder("WEIGHTS.PTH", b"harmless"),
        "pickle in a nested folder": _folder("deep/er/training_args.bin", EVIL[3]),
        "pickle of joblib": _folder("model.joblib", EVIL[5]),
        "pickle in numpy's objects": _folder("array.npy", _numpy_objects()),
        "pickle of torch.save under another name": _folder("notes.txt", _torch_zip(EVIL[2])),
        "pickle behind a name in Cyrillic": _folder("mоdel.ckpt", EVIL[2]),
        "pickle behind a name written backwards": _folder("\u202esrosnetefas.pkl", EVIL[2]),
    }),
    *_cases("checkpoint", "archive_not_accepted", {
        "zip that climbs": _folder("notes.txt", _zip({"../../escape": b"x"})),
        "zip bomb": _folder("notes.txt", _zip({"bomb": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED)),
        "tar that climbs": _folder("notes.txt", _tar("../../escape")),
        "tar with a link to a secret": _folder("notes.txt", _tar("inner", tarfile.SYMTYPE, "/etc/passwd")),
        "tar with a device": _folder("notes.txt", _tar("null", tarfile.CHRTYPE)),
        "gzip bomb": _folder("notes.txt", gzip.compress(b"\0" * 50_000_000)),
        "zip that begins and never ends": _folder("notes.txt", b"PK\x03\x04" + b"\0" * 1000),
    }),
    *_cases("checkpoint", "symlink_refused", {
        "link to a secret": _linked("vocab.txt", "/etc/passwd"),
        "link in place of the weights": _linked("model.safetensors", "/dev/zero"),
        "link that goes round": _linked("round", "round"),
        "link to the folder above": _linked("up", ".."),
    }),
    *_cases("checkpoint", "special_file_refused", {"pipe that nobody writes": _pipe}),
    *_cases("checkpoint", "too_many_files", {"maze of folders": _maze, "crowd of files": _crowd}),
    *_cases("checkpoint", "remote_code_refused", {
        "program beside the weights": _folder("modeling_llama.py", b"import os"),
        "library beside the weights": _folder("kernel.so", b"\x7fELF"),
    }),
    *_cases("checkpoint", "header_too_large truncated_file", {
        "header of 2**63 bytes": _folder(content=_safetensors(b"{}", length=2**63)),
        "header of 90 MB that is not there": _folder(content=_safetensors(b"{}", length=90_000_000)),
        "header cut off": _folder(content=SOUND[:20]),
        "file of three bytes": _folder(content=b"abc"),
    }),
    *_cases("checkpoint", "invalid_header", {
        "header of four million brackets": _folder(content=_safetensors(b'{"a": [' + b"0," * 4_000_001)),
        "header nested a hundred thousand deep": _folder(content=_safetensors(b'{"a":' * 100_000)),
        "header with a number of five thousand digits": _folder(content=_safetensors(b'{"a":' + b"9" * 5000 + b"}")),
        "header with one name twice": _folder(content=_safetensors(b'{"a": 1, "a": 2}')),
        "tensor of 2**62 to the 64th numbers": _folder(
            content=_safetensors({"a": _tensor(shape=[2**62] * 64)}, b"\0" * 4)
        ),
        "tensor of minus one number": _folder(content=_safetensors({"a": _tensor(shape=[-1, -1])}, b"\0" * 4)),
        "tensor of no known kind": _folder(content=_safetensors({"a": _tensor(dtype="__import__('os')")}, b"\0" * 4)),
        "tensor before the file": _folder(content=_safetensors({"a": _tensor(-8, -4)}, b"\0" * 4)),
        "two tensors in one place": _folder(content=_safetensors({"a": _tensor(), "b": _tensor()}, b"\0" * 4)),
        "bytes that no tensor has": _folder(content=SOUND + b"\0" * 100),
        "half of a character in a name": _folder(content=_safetensors(b'{"\xff": 1}')),
        "pickle behind the first bytes of safetensors": _folder(
            content=struct.pack("<Q", 99) + b"{" + EVIL[2].ljust(98)
        ),
    }),
    *_cases("checkpoint", "truncated_file invalid_header", {
        "tensor of a terabyte in four bytes": _folder(
            content=_safetensors({"a": _tensor(0, 2**40, [2**38])}, b"\0" * 4)
        ),
    }),
    *_cases("checkpoint", "invalid_config missing_tensor", {
        "configuration nested a hundred thousand deep": _folder("config.json", b"[" * 100_000),
        "configuration of five megabytes": _folder("config.json", b'{"a":"' + b"x" * 5_000_000 + b'"}'),
        "configuration that is no object": _folder("config.json", b"[1]"),
        "configuration with infinity": _folder("config.json", b'{"hidden_size": 1e999}'),
        "a billion blocks": _folder(num_hidden_layers=10**9),
        "heads of no size": _folder(num_attention_heads=0),
        "hidden size as a text": _folder(hidden_size="8"),
        "hidden size below nothing": _folder(hidden_size=-8),
    }),
    *_cases("checkpoint", "invalid_index unsafe_shard_name", {
        "index that climbs": _folder("model.safetensors.index.json", b'{"weight_map": {"a": "../../etc/passwd"}}'),
        "index with an absolute path": _folder("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}'),
        "index of a text": _folder("model.safetensors.index.json", b'{"weight_map": "a"}'),
    }),
    *_cases("pickled", "unsafe_pickle", {
        "torch archive that runs a command": _file(_torch_zip(EVIL[2])),
        "torch archive, protocol 4": _file(_torch_zip(EVIL[4])),
        "torch archive, old opcode": _file(_torch_zip(INST)),
        "old torch file that runs a command": _file(EVIL[2] * 5),
        "command behind an extension code": _file(_torch_zip(b"\x80\x02\x82\x01.")),
        "out-of-band buffer": _file(_torch_zip(b"\x80\x05\x97.")),
    }),
    *_cases("pickled", "invalid_pickle", {
        "torch archive as a zip bomb": _file(_zip({"m/data.pkl": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED)),
        "torch archive without a program": _file(_zip({"m/version": b"3"})),
        "tensor beyond its storage": _file(_torch_zip(_torch_view((2**40,), (1,)))),
        "tensor of negative size": _file(_torch_zip(_torch_view((-1,), (1,)))),
    }),
    *_cases("pickled", "not_a_tensor invalid_pickle", {
        "one number shown as four terabytes": _file(_torch_zip(_torch_view((2**40,), (0,)))),
    }),
    *_cases("pickled", "no_weights", {"lists of lists without end": _file(_torch_zip(_pickled_lists(60)))}),
    *_cases("pickled", "truncated_file", {
        "torch archive cut off": _file(_torch_zip(EVIL[2])[:60]),
        "pickle of a text of four gigabytes": _file(_torch_zip(b"\x80\x02X\xff\xff\xff\xffabc")),
        "pickle cut off": _file(b"\x80\x02}"),
    }),
    *_cases("pickled", "not_a_checkpoint", {"web page instead of weights": _file(b"<!doctype html>")}),
    *_cases("pickled", "pickle_too_large", {"old file of a terabyte": _file(b"\x80\x02}", size=2**40)}),
    *_cases("gguf", "invalid_gguf", {
        "no GGUF at all": _file(b"nope", "a.gguf"),
        "GGUF cut off": _file(b"GGUF\x03", "a.gguf"),
        "GGUF of another century": _file(gguf_file(version=2**31), "a.gguf"),
        "2**60 keys": _file(gguf_file(keys=2**60), "a.gguf"),
        "2**60 tensors": _file(gguf_file(tensors=2**60), "a.gguf"),
        "a name of 2**62 bytes": _file(gguf_file(keys=1, rest=struct.pack("<Q", 2**62)), "a.gguf"),
        "an array of 2**60 numbers": _file(gguf_file(keys=1, rest=gguf_array(4, 2**60)), "a.gguf"),
        "an array of 2**60 texts": _file(gguf_file(keys=1, rest=gguf_array(8, 2**60)), "a.gguf"),
        "arrays in arrays, five thousand deep": _file(gguf_file(keys=1, rest=_gguf_nested(5000)), "a.gguf"),
        "an array of no known kind": _file(gguf_file(keys=1, rest=gguf_array(99, 1, b"x")), "a.gguf"),
        "a tensor of 2**32 dimensions": _file(gguf_file(tensors=1, rest=gguf_tensor((1,), 2**32 - 1)), "a.gguf"),
        "a tensor of 2**63 numbers": _file(gguf_file(tensors=1, rest=gguf_tensor((2**63, 2))), "a.gguf"),
        "a tensor of no known kind": _file(gguf_file(tensors=1, rest=gguf_tensor((1,), kind=999)), "a.gguf"),
        "a tensor behind the end": _file(gguf_file(tensors=1, rest=gguf_tensor((4,), offset=2**62)), "a.gguf"),
    }),
    *_cases("image", "image_too_many_pixels", {
        "picture of 2**31 squared pixels": _file(_png(2**31 - 1, 2**31 - 1, rows=0), "a.png"),
        "picture that unpacks to ten gigabytes": _file(_png(80_000, 80_000, rows=1000), "a.png"),
        "GIF with a screen of 65535 squared": _file(b"GIF89a\xff\xff\xff\xff\0\0\0", "a.gif"),
    }),
    *_cases("image", "image_damaged", {
        "picture without pixels": _file(_png(0, 10), "a.png"),
        "picture that ends inside": _file(_png(64, 64)[:50], "a.png"),
        "JPEG without a size": _file(b"\xff\xd8\xff\xda" + b"\0" * 10, "a.jpg"),
    }),
    *_cases("image", "image_too_narrow", {"picture one pixel high": _file(_png(4000, 1), "a.png")}),
    *_cases("image", "image_too_complex", {
        "JPEG of a thousand scans": _file(b"\xff\xd8" + b"\xff\xda" * 1000, "a.jpg"),
    }),
    *_cases("image", "image_format_not_supported", {
        "SVG that reads a secret": _file(
            b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>', "a.svg"
        ),
        "PostScript": _file(b"%!PS-Adobe-3.0 EPSF\n(/etc/passwd) run", "a.eps"),
        "TIFF": _file(b"II*\0" + b"\xff" * 100, "a.tif"),
    }),
]  # fmt: skip
