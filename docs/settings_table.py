"""Writes docs/settings.md from the settings themselves. `make fix` runs it; a test says when the page is stale."""

from pathlib import Path

from pydantic_core import PydanticUndefined

from job_store.settings import Settings

PAGE = Path(__file__).parent / "settings.md"
HEAD = """\
# Settings

Every process of Modepress (API, worker, inference, `modepress up`) reads these from its environment, once, at start.
This table is made from `job_store/settings.py` by `make fix`.

| variable | type | default | meaning |
| --- | --- | --- | --- |
"""
TAIL = """
The command line and `modepress.Client` read two more: `MODEPRESS_URL` (the server; without it the stack that runs on
the data folder is found) and `MODEPRESS_API_KEY`. `docker-compose.yml` adds `MODEPRESS_POSTGRES_PASSWORD`,
`MODEPRESS_PUBLISH` (address and port on the host) and `MODEPRESS_TORCH_CPU_INDEX`, for compose itself.
"""


def page() -> str:
    """The whole page as it should be now."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = (
            "none"
            if field.default in (None, PydanticUndefined)
            else f"`{field.default}`"
            if field.default != ""
            else "empty"
        )
        kind = getattr(field.annotation, "__name__", str(field.annotation)).replace("typing.", "").replace("|", "or")
        kind = kind if kind != "Literal" else str(field.annotation).removeprefix("typing.Literal")
        rows.append(f"| `MODEPRESS_{name.upper()}` | {kind} | {default} | {field.description} |")
    return HEAD + "\n".join(rows) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
