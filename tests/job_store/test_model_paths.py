"""Names inside a model folder, and folders on the server: nothing leads out."""

from pathlib import Path

import pytest

from api_schemas.errors import InvalidRequest, NotPermitted
from api_schemas.relative_paths import check_relative_paths
from job_store.model_paths import resolve_text_under_roots, resolve_under_roots

UNSAFE = [
    "../config.json",
    "a/../../b",
    "a/..",
    "..",
    ".",
    "./a",
    "a/./b",
    "/etc/passwd",
    "//host/share",
    "~/x",
    "a//b",
    "a/",
    "",
    "a\\b",
    "..\\..\\b",
    "C:\\x",
    "C:x",
    "a\0b",
    "a\nb",
    "a\rb",
    "\x1b[31m",
    "a\x7f",
    "a\x85b",
    "a\u202eb",
    "a\u200bb",
    "a\u2028b",
    " a",
    "a ",
    "a/ b",
    "con.",
    "a" * 201,
    "ü" * 101,
]


@pytest.mark.parametrize("path", UNSAFE)
def test_unsafe_names(path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_relative_paths(["config.json", path])
    assert (caught.value.code, caught.value.param) == ("unsafe_path", "files.1.path")
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    "paths",
    [["a", "a"], ["Config.json", "config.JSON"], ["a", "a/b"], ["a/b", "a"], ["x/y/z", "X"], ["straße", "STRASSE"]],
)
def test_names_that_collide(paths: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_relative_paths(paths)
    assert caught.value.code == "duplicate_path"


def test_ordinary_names() -> None:
    check_relative_paths(
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "additional_chat_templates/tool_use.jinja",
            ".gitattributes",
        ]
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "model").mkdir(parents=True)
    (root / "text.txt").write_text("text")
    (tmp_path / "secret").mkdir()
    (tmp_path / "rootless").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "way-in").symlink_to(root / "model")
    return root


def test_a_folder_under_a_root(root: Path) -> None:
    assert resolve_under_roots(str(root / "model"), [root]) == root / "model"
    assert resolve_under_roots(str(root), [root]) == root
    assert resolve_under_roots(str(root.parent / "way-in"), [root]) == root / "model"
    assert resolve_text_under_roots(str(root / "text.txt"), [root], "path") == root / "text.txt"


@pytest.mark.parametrize(
    "outside",
    [
        "/root/../etc",
        "/etc",
        "{root}/..",
        "{root}/../secret",
        "{root}/link",
        "{root}less",
        "/nowhere",
        "{root}/../none",
    ],
)
def test_folders_outside_all_look_alike(root: Path, outside: str) -> None:
    with pytest.raises(NotPermitted, match="MODEPRESS_MODEL_ROOTS") as caught:
        resolve_under_roots(outside.format(root=root), [root])
    assert (caught.value.code, caught.value.param) == ("path_not_allowed", "path")


def test_without_roots_nothing_is_allowed(root: Path) -> None:
    with pytest.raises(NotPermitted, match="none"):
        resolve_under_roots(str(root), [])


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("{root}/none", "path_not_found"),
        ("{root}/text.txt", "path_not_found"),
        ("{root}/loop", "path_not_found"),
        ("{root}/" + "a" * 300, "path_not_found"),
    ],
)
def test_inside_a_root_what_is_missing_is_said(root: Path, path: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_under_roots(path.format(root=root), [root])
    assert caught.value.code == code


@pytest.mark.parametrize("path", ["model", "a\0b", ""])
def test_paths_that_are_none(root: Path, path: str) -> None:
    for resolve in (resolve_under_roots, lambda path, roots: resolve_text_under_roots(path, roots, "path")):
        with pytest.raises(InvalidRequest) as caught:
            resolve(path, [root])
        assert caught.value.code == "unsafe_path"


def test_a_text_must_be_a_file(root: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_text_under_roots(str(root / "model"), [root], "recipe.calibration.path")
    assert (caught.value.code, caught.value.param) == ("path_not_found", "recipe.calibration.path")
