"""Writes the exports of a recipe from a finished artifact's folder."""

from collections.abc import Sequence
from pathlib import Path

from api_schemas.exports import ExportConfig
from api_schemas.exports.gguf import GgufExport
from api_schemas.exports.onnx import OnnxExport
from api_schemas.reports import ExportReport
from compression.exporters.gguf import write_gguf
from compression.exporters.onnx.texts import Texts
from compression.exporters.vllm import write_vllm


def write_exports(exports: Sequence[ExportConfig], folder: Path, texts: Texts) -> tuple[ExportReport, ...]:
    """Write each export into the artifact at `folder`, under exports/.

    Args:
        exports: what to write.
        folder: of the finished artifact.
        texts: for those whose form is chosen and judged on text.

    Raises:
        InvalidRecipe: a format that cannot express the artifact, by the codes of `preflight.exports`.
        JobFailed: `export_mismatch`: what was written does not read back as the artifact.
    """
    return tuple(_write(export, folder, texts) for export in exports)


def _write(export: ExportConfig, folder: Path, texts: Texts) -> ExportReport:
    target = folder / export.target
    if isinstance(export, GgufExport):
        return write_gguf(folder, target, export.dtype)
    if isinstance(export, OnnxExport):
        from compression.exporters.onnx.export import write_onnx  # onnx and onnxruntime, for those who ask for them

        return write_onnx(folder, target, export, texts)
    return write_vllm(folder, target)
