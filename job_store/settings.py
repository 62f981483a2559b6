"""Every setting of the service, from the environment (`MODEPRESS_*`). docs/settings.md is this file as a table."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from api_schemas.quotas import Quota

MIB = 1024**2
GIB = 1024**3


class Settings(BaseSettings):
    """Read once per process; every field can be set as `MODEPRESS_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="MODEPRESS_", extra="ignore", frozen=True)

    home: Path = Field(Path(".modepress"), description="data folder: database, uploads, models, jobs, logs")
    database_url: str | None = Field(None, description="SQLAlchemy URL; default is SQLite under home")
    broker_url: str | None = Field(None, description="redis://… or filesystem://; set by `modepress up`")
    host: str = Field("127.0.0.1", description="address the API listens on")
    port: int = Field(8000, ge=0, le=65535, description="port of the API; `up` takes a free one when it is taken")
    inference_url: str = Field("http://127.0.0.1:8001", description="where the API finds the inference process")
    auth: Literal["required", "none"] = Field("required", description="none is for loopback only")
    max_upload_bytes: int = Field(200 * 10**9, gt=0, description="largest upload")
    max_part_bytes: int = Field(64 * MIB, gt=0, description="largest part of an upload")
    max_file_bytes: int = Field(512 * MIB, gt=0, description="largest file in one POST /v1/files; uploads take more")
    max_body_bytes: int = Field(8 * MIB, gt=0, description="largest JSON body")
    requests_per_minute: int = Field(6000, ge=0, description="of one key, unless the key has its own; 0: no limit")
    concurrent_requests: int = Field(256, ge=0, description="of one key at a time, open streams too; 0: no limit")
    owner_max_bytes: int = Field(0, ge=0, description="files, uploads and models of one owner; 0: no limit")
    owner_max_jobs: int = Field(0, ge=0, description="jobs of one owner waiting or running; 0: no limit")
    owner_max_tokens: int = Field(0, ge=0, description="tokens of one owner's chats per day (UTC); 0: no limit")
    upload_ttl_seconds: int = Field(7 * 86400, gt=0, description="a pending upload expires after this")
    model_roots: str = Field("", description="folders a user may register models and text from, joined by ':'")
    hub_offline: bool = Field(False, description="refuse hub ids with a clear error instead of downloading")
    device: str = Field(
        "auto",
        pattern="^(auto|cpu|cuda(:[0-9]+)?)$",
        description="of jobs: cpu, cuda, cuda:N, or auto: a GPU where there is one",
    )
    lease_seconds: float = Field(90.0, gt=0, description="a job whose worker is silent this long is taken over")
    renew_seconds: float = Field(15.0, gt=0, description="how often a worker renews its lease")
    reaper_seconds: float = Field(15.0, gt=0, description="how often expired leases are looked for")
    cancel_grace_seconds: float = Field(5.0, gt=0, description="from SIGTERM to SIGKILL")
    max_attempts: int = Field(3, ge=1, description="a job that loses its worker this often fails")
    self_check: Literal["required", "skip"] = Field(
        "required", description="whether a worker checks disk, memory, numbers and devices before it takes work"
    )
    heartbeat_seconds: float = Field(10.0, gt=0, description="how often a worker writes what its job is doing")
    heartbeat_event_seconds: float = Field(
        300.0, gt=0, description="how often one of these heartbeats becomes an event of the job"
    )
    stall_seconds: float = Field(
        1800.0, gt=0, description="a job process that does not move for so long is dumped, killed and tried again"
    )
    peak_flops: float = Field(
        0.0, ge=0, description="operations per second a worker's device can do; 0: unknown, and no MFU is shown"
    )
    threads: int = Field(0, ge=0, description="CPU threads of a job; 0 takes the cores there are")
    inference_memory_bytes: int = Field(
        8 * GIB, gt=0, description="above this, loaded models are unloaded, oldest first"
    )
    inference_max_waiting: int = Field(64, ge=1, description="requests that wait; one more is a 429")
    image_hosts: str = Field("", description="hosts images may be fetched from, joined by ','; empty: data: URLs only")
    image_fetch_seconds: float = Field(10.0, gt=0, description="for fetching all images of a request")
    max_images: int = Field(8, ge=0, description="images in one chat request; 0 refuses them")
    max_image_bytes: int = Field(8 * MIB, gt=0, description="image files of one chat request together")
    max_image_pixels: int = Field(
        4096 * 4096, gt=0, le=89_478_485, description="largest image; read from its header, before it is decoded"
    )
    webhook_private_hosts: str = Field(
        "", description="hosts webhooks may reach though they are not on the public internet, joined by ','"
    )
    keep_job_days: int = Field(0, ge=0, description="`modepress gc` removes logs of jobs ended before; 0: never")
    keep_file_days: int = Field(0, ge=0, description="`modepress gc` removes uploaded files made before; 0: never")
    keep_artifact_days: int = Field(0, ge=0, description="`modepress gc` removes artifacts made before; 0: never")
    keep_audit_days: int = Field(0, ge=0, description="`modepress gc` removes audit lines written before; 0: never")
    log_level: str = Field("INFO", description="of all processes")
    log_format: Literal["plain", "json"] = Field(
        "plain", description="of the API: json has one object a line, with request and job ids; workers always do"
    )

    @property
    def resolved_home(self) -> Path:
        """The data folder as an absolute path."""
        return self.home.expanduser().resolve()

    @property
    def resolved_database_url(self) -> str:
        """The database, or SQLite under the data folder."""
        return self.database_url or f"sqlite:///{self.resolved_home / 'modepress.db'}"

    @property
    def quota(self) -> Quota:
        """The limits of an owner that has none of its own."""
        return Quota(
            bytes=self.owner_max_bytes or None, jobs=self.owner_max_jobs or None, tokens=self.owner_max_tokens or None
        )

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders from which models and text may be registered, resolved."""
        return tuple(Path(root).expanduser().resolve() for root in self.model_roots.split(":") if root)

    @property
    def allowed_image_hosts(self) -> frozenset[str]:
        """The hosts from which images may be fetched, in lower case, some with `:port`."""
        return _hosts(self.image_hosts)

    @property
    def private_webhook_hosts(self) -> frozenset[str]:
        """The hosts that webhooks may reach wherever they are, in lower case, some with `:port`."""
        return _hosts(self.webhook_private_hosts)


def _hosts(joined: str) -> frozenset[str]:
    return frozenset(host.strip().lower() for host in joined.split(",") if host.strip())
