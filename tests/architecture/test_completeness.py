"""What belongs together is there together: each method has its parts, each page and table is current."""

import ast
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from api_schemas.methods import MethodConfig
from docs.settings_table import PAGE, page

ROOT = Path(__file__).parents[2]
SOURCES = ("api_schemas", "preflight", "compression", "job_store", "workers", "service", "modepress")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def method_names() -> list[str]:
    """Every value of `method` in the union."""
    union: Any = MethodConfig
    while hasattr(union, "__metadata__"):  # Annotated
        union = get_args(union)[0]
    configs = get_args(union) or (union,)
    return [get_args(config.model_fields["method"].annotation)[0] for config in configs]


def python_files() -> list[Path]:
    return [
        path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py")) if "versions" not in path.parts
    ]


@pytest.mark.parametrize("method", method_names())
def test_each_method_has_config_module_test_and_page(method: str) -> None:
    assert (ROOT / "api_schemas" / "methods" / f"{method}.py").is_file()
    assert (ROOT / "compression" / "methods" / f"{method}.py").is_file()
    assert list((ROOT / "tests" / "compression").rglob(f"test_{method}*.py"))
    described = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    assert method in described


def test_settings_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/settings.md is stale: make fix"


def test_no_file_and_no_function_is_too_long() -> None:
    long_files, long_functions = [], []
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(ROOT))
        if len(text.splitlines()) > MAX_FILE_LINES:
            long_files.append(f"{name}: {len(text.splitlines())}")
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and (lines := _lines(node)) > MAX_FUNCTION_LINES
            ):
                long_functions.append(f"{name}:{node.name}: {lines}")
    assert (long_files, long_functions) == ([], [])


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body: signature and docstring do not make a function hard to follow."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_no_file_is_called_utils() -> None:
    assert [
        path for path in python_files() if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES
    ] == []


def test_no_unfinished_business() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|raise NotImplementedError)\b")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}" for path in python_files() if (match := marks.search(path.read_text()))
    ]
    assert found == []


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")] + sorted(
        (ROOT / "docs").rglob("*.md")
    )
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_decisions_are_numbered_without_a_gap() -> None:
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
