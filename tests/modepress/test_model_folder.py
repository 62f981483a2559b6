"""Which files are pushed."""

from pathlib import Path

import pytest

from api_schemas.errors import InvalidRequest
from modepress.model_folder import look_into, sha256_of


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_pickles_and_other_weights_stay_at_home_with_a_reason(tmp_path: Path) -> None:
    names = ("model.safetensors", "config.json", "pytorch_model.bin", "model.gguf", ".git/config", "extra/vocab.txt")
    found = look_into(write(tmp_path, *names))
    assert [file.name for file in found.files] == ["config.json", "extra/vocab.txt", "model.safetensors"]
    assert set(found.skipped) == {"pytorch_model.bin", "model.gguf"}
    assert "pickle" in found.skipped["pytorch_model.bin"]
    assert found.bytes == sum(len(file.name) for file in found.files)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "blobs/abc")
    snapshot = write(tmp_path / "snapshot", "config.json")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    assert look_into(snapshot).files[1].bytes == len("blobs/abc")


def test_a_folder_of_pickles_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        look_into(write(tmp_path, "pytorch_model.bin"))
    assert refused.value.code == "no_safetensors"
    assert "pytorch_model.bin" in refused.value.message


def test_digest_tells_how_far_it_is(tmp_path: Path) -> None:
    heard = list[int]()
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file", heard.append).startswith("ba7816bf")
    assert heard == [3]
