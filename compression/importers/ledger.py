"""The account of an import: where every tensor of the result comes from, and what became of every tensor read.

Loaders of foreign checkpoints usually match what they can and drop the rest without a word; a renamed key then becomes
a model that talks nonsense. Here every source key is used, dropped by a named rule, or an error, and every target has a
named source, or is an error. Nothing is written before the account is balanced. It is kept in the artifact as JSON.

    ledger = Ledger("tinygptv", {source.role: source for source in sources}, {"text_branch": "not run in this model"})
    ledger.use("visual.cls", Key("vision", "cls_token"))
    ledger.use("q.weight", Key("language", "qkv.weight"), how="rows of the query", build=lambda fused: fused[:64])
    ledger.drop("q_former", "text_branch", lambda name: name.startswith("t5_proj."))
    ledger.balance({name: tuple(tensor.shape) for name, tensor in model_on_meta.state_dict().items()})
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from api_schemas.errors import InvalidCheckpoint
from compression.importers.sources import Source
from preflight.strict_json import read_object, shown, shown_list

FILE = "import_ledger.json"
FORMAT = 1
COPIED = "copied"
# Rules for what stands beside the weights in training files (`pickled.BESIDE`); importers add their own.
BESIDE_RULES = {
    "optimizer_state": "moments of an optimiser: only further training would need them",
    "training_state": "where a training run stood",
    "author_settings": "the authors' options, not read",
}

Build = Callable[..., Tensor]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Key:
    """One stored tensor: the role of its source, and its name there."""

    role: str
    name: str

    def __str__(self) -> str:
        """Say it as the ledger does."""
        return f"{self.role}:{self.name}"


@dataclass(frozen=True)
class Entry:
    """How one target is made: `build` of the tensors at `keys`, in their order; `how` says it in words."""

    target: str
    keys: tuple[Key, ...]
    how: str
    build: Build


class Ledger:
    """Entries and drops of one import; see the module's text."""

    def __init__(self, importer: str, sources: Mapping[str, Source], rules: Mapping[str, str]) -> None:
        """Begin an account.

        Args:
            importer: the family's name.
            sources: by role.
            rules: reasons why a tensor may be left behind: a short name, and why in words.
        """
        self.importer, self.sources = importer, dict(sources)
        self.rules = {**BESIDE_RULES, **rules}
        self.entries: dict[str, Entry] = {}
        self.dropped: dict[Key, str] = {}
        self._used: set[Key] = set()

    def use(self, target: str, *keys: Key, how: str = COPIED, build: Build = _itself) -> None:
        """Say what a target is made of. `build` must work on meta tensors too: shapes are checked before any is read.

        Without keys, `build` takes nothing and makes a constant, and `how` must say why that is right.

        Raises:
            InvalidCheckpoint: `missing_tensor`: a source lacks the key.
            ValueError: the target has a source already.
        """
        if target in self.entries:
            raise ValueError(f"{target} has two sources: {self.entries[target].keys} and {keys}")
        for key in keys:
            source = self.sources[key.role]
            if key.name not in source.stored:
                raise InvalidCheckpoint(
                    "missing_tensor",
                    f"{source.label} has no {shown(key.name)}, which {target} is made of; give the complete file",
                    key.name,
                )
        self.entries[target] = Entry(target, keys, how, build)
        self._used.update(keys)

    def drop(self, role: str, rule: str, matches: Callable[[str], bool]) -> list[str]:
        """Leave behind, by a named rule, the keys of a source that match and that nothing uses; return their names."""
        if rule not in self.rules:
            raise ValueError(f"no rule is called {rule!r}")
        found = [name for name in self.unaccounted(role) if matches(name)]
        self.dropped.update(dict.fromkeys((Key(role, name) for name in found), rule))
        return found

    def unaccounted(self, role: str) -> list[str]:
        """Keys of a source that are neither used nor dropped so far, sorted."""
        return [
            name
            for name in sorted(self.sources[role].stored)
            if Key(role, name) not in self._used and Key(role, name) not in self.dropped
        ]

    def balance(self, targets: Mapping[str, Sequence[int]]) -> None:
        """Check that the account is complete and that every shape is right; no tensor is read.

        Args:
            targets: every tensor of the result with its shape.

        Raises:
            InvalidCheckpoint: `unexpected_tensor`, `missing_tensor` or `wrong_shape`, naming keys and files.
        """
        for role, source in self.sources.items():
            left = self.unaccounted(role)
            if left:
                message = f"{source.label} has {shown_list(left)}: nothing uses them and no rule drops them"
                raise InvalidCheckpoint("unexpected_tensor", f"{message}; is this the right file?", left[0])
        absent = sorted(targets.keys() - self.entries.keys())
        if absent:
            message = f"no source gives {shown_list(absent)}; a file is missing or of another model"
            raise InvalidCheckpoint("missing_tensor", message, absent[0])
        extra = sorted(self.entries.keys() - targets.keys())
        if extra:
            origin = ", ".join(map(str, self.entries[extra[0]].keys))
            message = f"{shown_list(extra)} (from {origin}): the model has no place for them; is this the right file?"
            raise InvalidCheckpoint("unexpected_tensor", message, extra[0])
        for target, shape in targets.items():
            self._check_shape(self.entries[target], tuple(shape))

    def _check_shape(self, entry: Entry, wanted: tuple[int, ...]) -> None:
        metas = [self.sources[key.role].meta(key.name) for key in entry.keys]
        origin = ", ".join(f"{key} {list(meta.shape)}" for key, meta in zip(entry.keys, metas, strict=True))
        try:
            with torch.device("meta"):
                found = tuple(entry.build(*metas).shape)
        except (RuntimeError, IndexError, ValueError) as error:
            found, origin = (), f"{origin}, which do not fit together: {error}"
        if found != wanted:
            raise InvalidCheckpoint(
                "wrong_shape",
                f"{entry.target} must be {list(wanted)}, not {list(found)} as of {origin}; is this the right file?",
                entry.keys[0].name if entry.keys else entry.target,
            )

    def make(self, target: str) -> Tensor:
        """Read what a target is made of, and make it."""
        entry = self.entries[target]
        return entry.build(*(self.sources[key.role].read(key.name) for key in entry.keys)).contiguous()

    def dropped_bytes(self) -> dict[str, int]:
        """Bytes left behind, by rule; also what stood beside the weights."""
        total: dict[str, int] = {}
        for key, rule in self.dropped.items():
            total[rule] = total.get(rule, 0) + self.sources[key.role].bytes(key.name)
        for source in self.sources.values():
            for rule, size in source.beside.values():
                total[rule] = total.get(rule, 0) + size
        return total

    def record(self) -> dict[str, Any]:
        """The account as JSON: sources with fingerprints, targets, and what was dropped by which rule."""
        sizes = self.dropped_bytes()
        names: dict[str, list[str]] = {rule: [] for rule in sizes}
        for key, rule in self.dropped.items():
            names[rule].append(str(key))
        return {
            "format": FORMAT,
            "importer": self.importer,
            "sources": {role: source.fingerprint() for role, source in self.sources.items()},
            "targets": {
                target: {"from": [str(key) for key in entry.keys], "how": entry.how}
                for target, entry in sorted(self.entries.items())
            },
            "dropped": {
                rule: {"why": self.rules[rule], "bytes": size, "keys": sorted(names[rule])}
                for rule, size in sorted(sizes.items())
            },
        }


def read_ledger(folder: Path) -> dict[str, Any]:
    """The account in an imported model's folder.

    Raises:
        InvalidCheckpoint: `invalid_ledger`: absent, not sound JSON, or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        raise InvalidCheckpoint("invalid_ledger", f"{folder.name} has no {FILE}: it was not imported here", FILE)
    record = read_object(path, "invalid_ledger", max_bytes=64 * 1024**2)
    if record.get("format") != FORMAT:
        raise InvalidCheckpoint(
            "invalid_ledger", f"{FILE} has format {shown(record.get('format'))}, not {FORMAT}", FILE
        )
    return record


def shapes_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, of a module's `state_dict().items()` on the meta device for one."""
    return {name: tuple(tensor.shape) for name, tensor in tensors}
