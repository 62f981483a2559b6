"""Health, readiness, metrics, the lean import, and the document that describes it all."""

import ast
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from tests.service.running_api import RunningApi


def test_readiness_names_what_is_away(client: httpx.Client) -> None:
    answer = client.get("/readyz")
    assert answer.status_code == 503
    checks = answer.json()["checks"]
    assert {name: check["ok"] for name, check in checks.items()} == {
        "database": True,
        "broker": True,
        "inference": False,
    }
    assert "ConnectError" in checks["inference"]["detail"]
    assert client.get("/healthz").json() == {"status": "ok"}


def test_metrics_count_by_route_template(client: httpx.Client) -> None:
    client.get("/v1/models/none")
    client.get("/v1/files/one")
    client.get("/v1/files/two")
    client.get("/nowhere")
    client.post("/v1/files", files={"file": ("f", b"12345")}, data={"purpose": "model"})
    text = client.get("/metrics").text
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def requests(route: str, status: str) -> float:
        return samples.get(("http_requests_total", ("method", "GET"), ("route", route), ("status", status)), 0.0)

    assert requests("/v1/models/{model_id}", "404") >= 1
    assert requests("/v1/files/{file_id}", "404") >= 2
    assert requests("unmatched", "404") >= 1
    assert samples[("modepress_upload_bytes_total",)] >= 5
    assert ("modepress_jobs", ("status", "queued")) in samples
    assert ("modepress_queue_depth",) in samples
    assert ("modepress_queue_oldest_seconds",) in samples
    assert any(name[0] == "http_request_seconds_bucket" for name in samples)
    assert "/v1/files/one" not in text


def test_the_front_door_is_lean() -> None:
    """The API starts without torch, transformers or the algorithms."""
    program = (
        "import sys, service.app\n"
        "print([name for name in ('torch', 'transformers', 'compression', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_route_documents_its_errors_and_its_key(api: RunningApi) -> None:
    document = create_app(api.settings()).openapi()
    scheme = document["components"]["securitySchemes"]
    assert [value["scheme"] for value in scheme.values()] == ["bearer"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation.get("description") or operation.get("summary"), where
            if path.startswith("/v1/"):
                assert operation["security"], where
                for status in ("4XX", "5XX"):
                    schema = operation["responses"][status]["content"]["application/json"]["schema"]
                    assert schema["$ref"].endswith("/ErrorResponse"), where
                assert "422" not in operation["responses"], where


def test_routes_stay_thin() -> None:
    """Logic sits in the stores: the body of a route is at most nine lines."""
    for file in Path("service/routes").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:]
                assert (node.end_lineno or 0) - body[0].lineno < 9, f"{file}: {node.name}"


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_document_can_be_read_in_a_browser(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200
