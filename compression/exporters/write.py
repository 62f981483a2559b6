"""Writes the exports of a recipe from a finished artifact's folder."""

from collections.abc import Sequence
from pathlib import Path

from api_schemas.exports import ExportConfig
from api_schemas.exports.gguf import GgufExport
from api_schemas.reports import ExportReport
from compression.exporters.gguf import write_gguf
from compression.exporters.vllm import write_vllm


def write_exports(exports: Sequence[ExportConfig], folder: Path) -> tuple[ExportReport, ...]:
    """Write each export into the artifact at `folder`, under exports/.

    Raises:
        InvalidRecipe: a format that cannot express the artifact, by the codes of `preflight.exports`.
        JobFailed: `export_mismatch`: what was written does not read back as the artifact.
    """
    return tuple(_write(export, folder) for export in exports)


def _write(export: ExportConfig, folder: Path) -> ExportReport:
    target = folder / export.target
    return write_gguf(folder, target, export.dtype) if isinstance(export, GgufExport) else write_vllm(folder, target)
