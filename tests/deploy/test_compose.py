"""The compose files obey the published schema, and what they name is really there."""

import json
import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from job_store.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ("docker-compose.yml", "docker-compose.gpu.yml")
OURS = ("api", "worker", "inference")
# Read by compose itself, not by our processes.
INTERPOLATED = {"MODEPRESS_POSTGRES_PASSWORD", "MODEPRESS_PUBLISH", "MODEPRESS_TORCH_CPU_INDEX"}


def load(name: str = COMPOSE[0]) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return content


def setting_names() -> set[str]:
    return {f"MODEPRESS_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("name", COMPOSE)
def test_published_schema(name: str) -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text("utf-8"))
    jsonschema.validate(load(name), schema)


def test_schema_test_would_notice() -> None:
    broken = load()
    broken["services"]["api"]["healtcheck"] = {}
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text("utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_every_service_has_a_health_check_and_restarts() -> None:
    for name, service in load()["services"].items():
        assert service["healthcheck"]["test"], name
        assert service["restart"] == "unless-stopped", name


def test_environment_names_are_settings() -> None:
    for name in OURS:
        assert set(load()["services"][name]["environment"]) <= setting_names(), name
    words = set(re.findall(r"MODEPRESS_[A-Z][A-Z_]+", (ROOT / COMPOSE[0]).read_text(encoding="utf-8")))
    assert words <= setting_names() | INTERPOLATED


def test_environment_values_are_valid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        for variable, value in load()["services"][name]["environment"].items():
            monkeypatch.setenv(variable, re.sub(r"\$\{[A-Z_]+(?::-([^}]*)|:\?[^}]*)\}", r"\1", str(value)))
        settings = Settings()
        assert settings.resolved_home == Path("/data")
        assert settings.broker_url == "redis://redis:6379/0"


@pytest.mark.parametrize("name", OURS)
def test_commands_start_modules_that_exist(name: str) -> None:
    command = load()["services"][name]["command"]
    assert command[:2] == ["python", "-m"]
    modules = [command[2], *(word.partition(":")[0] for word in command[3:] if re.fullmatch(r"[a-z_.]+:[a-z_]+", word))]
    for module in modules:
        assert find_spec(module) is not None, module


def test_ports_agree() -> None:
    services = load()["services"]
    api, inference = services["api"], services["inference"]
    assert api["command"][api["command"].index("--port") + 1] == api["environment"]["MODEPRESS_PORT"] == "8000"
    assert api["ports"] == ["${MODEPRESS_PUBLISH:-127.0.0.1:8000}:8000"]
    assert services["api"]["environment"]["MODEPRESS_INFERENCE_URL"] == "http://inference:8001"
    assert inference["command"][inference["command"].index("--port") + 1] == "8001"
    assert "ports" not in inference, "only the API may reach it"


def test_redis_keeps_and_never_evicts() -> None:
    command = " ".join(load()["services"]["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_keys_are_required_where_others_can_knock() -> None:
    environment = load()["services"]["api"]["environment"]
    assert environment["MODEPRESS_HOST"] == "0.0.0.0"  # noqa: S104 (inside its container)
    assert environment["MODEPRESS_AUTH"] == "required"


def test_gpu_override_changes_services_that_exist() -> None:
    assert set(load(COMPOSE[1])["services"]) <= set(load()["services"])


def test_named_volumes_are_declared() -> None:
    content = load()
    used = {mount.partition(":")[0] for service in content["services"].values() for mount in service.get("volumes", [])}
    assert used == set(content["volumes"])


@pytest.mark.parametrize("name", ["api", "worker"])
def test_images_copy_every_package_and_nothing_that_is_not_there(name: str) -> None:
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()}
    assert [word for word in copied if not (ROOT / word).exists()] == []
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "docs", "benchmarks"}
    assert packages <= copied


def test_the_api_image_installs_no_torch() -> None:
    text = (ROOT / "docker" / "api.Dockerfile").read_text(encoding="utf-8")
    assert "worker]" not in text
    assert "find_spec('torch') is None" in text
