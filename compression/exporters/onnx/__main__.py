"""`python -m compression.exporters.onnx FOLDER TARGET`: an ONNX graph of a model folder, without a job."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from torch import Tensor
from transformers import AutoTokenizer

from api_schemas.calibration import Calibration, Evaluation
from api_schemas.errors import ModepressError
from api_schemas.exports.onnx import OnnxExport, OnnxWeights
from compression.core.text_rows import Role
from compression.core.texts import load_windows
from compression.exporters.onnx.export import write_onnx
from compression.exporters.onnx.texts import Texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr that names what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m compression.exporters.onnx", description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--weights", choices=get_args(OnnxWeights), default="int8")
    parser.add_argument("--inputs", choices=("block", "tensor"), default="block")
    parser.add_argument("--calibration", type=Path, help="a text file; default is Python's own prose")
    parser.add_argument("--evaluation", type=Path, help="another one")
    parser.add_argument("--windows", type=int, default=2, help="of the evaluation text")
    parser.add_argument("--sequence-length", type=int, default=2048)
    asked = parser.parse_args(arguments)
    try:
        export = OnnxExport(format="onnx", weights=asked.weights, inputs=asked.inputs)
        texts = Texts(
            _read(asked, asked.calibration, "calibration", 2),
            _read(asked, asked.evaluation, "evaluation", asked.windows),
        )
        report = write_onnx(asked.folder, asked.target, export, texts)
    except ModepressError as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        return 1
    sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    return 0


def _read(asked: argparse.Namespace, path: Path | None, role: Role, windows: int) -> Tensor:
    settings = {"sequence_length": asked.sequence_length}
    if path is not None:
        settings |= {"source": "file", "path": str(path.resolve())}
    source = (Calibration if role == "calibration" else Evaluation).model_validate(settings)
    tokenizer = AutoTokenizer.from_pretrained(asked.folder, local_files_only=True, trust_remote_code=False)
    return load_windows(
        source, windows, tokenizer, files={}, roots=None, hub_offline=True, role=role, write_text=None
    ).tokens


if __name__ == "__main__":
    sys.exit(main())
