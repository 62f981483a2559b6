"""Webhooks: written with the end of a job, signed so that another implementation agrees, retried, and never inwards."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import Engine

from api_schemas.errors import Conflict, ErrorBody, InvalidRequest, NotFound
from api_schemas.jobs import Usage
from api_schemas.webhooks import WebhookRequest
from job_store.jobs import JobStore
from job_store.leases import Ending, LeaseStore
from job_store.messenger import BACKOFF, Messenger
from job_store.outbound import system_resolver
from job_store.owners import Viewer
from job_store.settings import Settings
from job_store.webhooks import MOST_PER_OWNER, WebhookStore
from tests.job_store.conftest import HASH, Clock, job_request

ANNA = Viewer("anna")
PUBLIC = "93.184.215.14"


class Receiver:
    """A server on loopback that keeps what it is sent and answers as it is told."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.status = 200
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.received.append(({key.lower(): value for key, value in self.headers.items()}, body))
                self.send_response(receiver.status)
                self.send_header("location", "http://127.0.0.1:1/")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook?x=1"


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()
        thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as one:
        yield one


class Post:
    """Webhooks of anna and bert, the messenger, and a clock."""

    def __init__(self, engine: Engine, clock: Clock, home: Path, port: int) -> None:
        self.engine, self.clock = engine, clock
        self.settings = Settings(home=home, webhook_private_hosts=f"127.0.0.1:{port}")
        self.hooks = self.of(ANNA)
        self.jobs = JobStore(engine, clock=clock, viewer=ANNA)
        self.messenger = Messenger(engine, self.settings, clock=clock)

    def of(self, viewer: Viewer) -> WebhookStore:
        hosts = self.settings.private_webhook_hosts
        return WebhookStore(self.engine, hosts, system_resolver, viewer=viewer, clock=self.clock)

    def end_a_job(self) -> str:
        job_id = self.jobs.create(job_request(), recipe_hash=HASH)[0].id
        self.jobs.request_cancel(job_id)
        return job_id


@pytest.fixture
def post(engine: Engine, clock: Clock, tmp_path: Path, receiver: Receiver) -> Post:
    return Post(engine, clock, tmp_path, receiver.port)


def test_a_message_arrives_once_and_another_library_verifies_it(post: Post, receiver: Receiver) -> None:
    hook = post.hooks.create(WebhookRequest(url=receiver.url))
    job_id = post.end_a_job()
    post.clock.now = time.time()  # the library looks at its own clock
    assert post.messenger.send_due() == 1
    assert post.messenger.send_due() == 0
    [(headers, body)] = receiver.received
    client = openai.OpenAI(api_key="none", webhook_secret=hook.secret)
    client.webhooks.verify_signature(body, headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body.replace(b"cancelled", b"succeeded"), headers)
    client.close()
    told = json.loads(body)
    assert told["type"] == "compression.job.cancelled"
    assert told["data"] == {
        "id": job_id, "status": "cancelled", "model": "tiny", "error": None, "compressed_model": None,
    }  # fmt: skip
    assert told["timestamp"] == "1970-01-12T13:46:40+00:00"
    [delivery] = post.hooks.deliveries(hook.id, limit=9).data
    assert headers["webhook-id"] == delivery.id
    assert (delivery.status, delivery.attempts, delivery.last_status) == ("delivered", 1, 200)


def test_each_end_is_told_and_only_to_the_owner(post: Post, engine: Engine, receiver: Receiver) -> None:
    all_ends = post.hooks.create(WebhookRequest(url=receiver.url))
    failures = post.hooks.create(WebhookRequest(url=receiver.url, events=("compression.job.failed",)))
    berts = post.of(Viewer("bert")).create(WebhookRequest(url=receiver.url))
    leases = LeaseStore(engine, max_attempts=3, clock=post.clock)
    error = ErrorBody(message="m", type="job_error", param=None, code="quality_gate")
    endings = (
        Ending("succeeded", "m", Usage(), report={"files": {}}),
        Ending("failed", "m", Usage(), error=error),
    )
    for ending in endings:
        job_id = post.jobs.create(job_request(), recipe_hash=HASH)[0].id
        claim = leases.claim(job_id, "w", 90)
        assert claim is not None
        assert leases.finish(job_id, claim.fence, ending)
    post.end_a_job()
    kinds = {delivery.type for delivery in post.hooks.deliveries(all_ends.id, limit=9).data}
    assert kinds == {f"compression.job.{end}" for end in ("succeeded", "failed", "cancelled")}
    assert [one.type for one in post.hooks.deliveries(failures.id, limit=9).data] == ["compression.job.failed"]
    assert post.of(Viewer("bert")).deliveries(berts.id, limit=9).data == []
    with pytest.raises(NotFound, match="webhook_"):
        post.hooks.get(berts.id)
    assert post.messenger.send_due() == 4
    codes = {json.loads(body)["data"]["error"] for _, body in receiver.received}
    assert codes == {None, "quality_gate"}


@pytest.mark.parametrize("status", [500, 302, 404])
def test_what_does_not_arrive_is_sent_again_with_growing_pauses(post: Post, receiver: Receiver, status: int) -> None:
    """Redirects too are failures: nothing is followed."""
    hook = post.hooks.create(WebhookRequest(url=receiver.url))
    post.end_a_job()
    receiver.status = status
    for pause in (*BACKOFF, 0):
        assert post.messenger.send_due() == 1
        post.clock.now += max(0, pause - 1)
        assert post.messenger.send_due() == 0
        post.clock.now += 1
    [delivery] = post.hooks.deliveries(hook.id, limit=9).data
    assert (delivery.status, delivery.attempts, delivery.last_status) == ("failed", len(BACKOFF) + 1, status)
    assert delivery.last_error == f"answered {status}"
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
    assert len({body for _, body in receiver.received}) == 1


def test_a_receiver_that_is_gone_is_left_in_peace(post: Post, receiver: Receiver) -> None:
    hook = post.hooks.create(WebhookRequest(url=receiver.url))
    post.end_a_job()
    receiver.status = 410
    post.messenger.send_due()
    assert "410" in (post.hooks.get(hook.id).disabled or "")
    post.end_a_job()
    assert post.messenger.send_due() == 0


def test_two_senders_send_once(post: Post, receiver: Receiver) -> None:
    post.hooks.create(WebhookRequest(url=receiver.url))
    for _ in range(10):
        post.end_a_job()
    senders = [Messenger(post.engine, post.settings, clock=post.clock) for _ in range(3)]
    threads = [threading.Thread(target=sender.send_due) for sender in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == len(receiver.received) == 10


def test_a_name_that_turns_inwards_later_is_not_followed(post: Post, engine: Engine, tmp_path: Path) -> None:
    """The address is checked at each try, and the connection goes to the address that was checked."""
    answers = {"now": PUBLIC}
    dialled = []

    def dial(address: str, port: int, _: float) -> socket.socket:
        dialled.append((address, port))
        raise OSError("no way there")

    resolve = lambda _host, _port: [answers["now"]]  # noqa: E731
    hooks = WebhookStore(engine, frozenset(), resolve, viewer=ANNA, clock=post.clock)
    hook = hooks.create(WebhookRequest(url="https://hooks.example/in"))
    post.end_a_job()
    messenger = Messenger(engine, Settings(home=tmp_path), resolve=resolve, dial=dial, clock=post.clock)
    messenger.send_due()
    assert dialled == [(PUBLIC, 443)]
    answers["now"] = "169.254.169.254"
    post.clock.now += BACKOFF[0]
    messenger.send_due()
    assert dialled == [(PUBLIC, 443)]
    [delivery] = hooks.deliveries(hook.id, limit=9).data
    assert "not on the public internet" in (delivery.last_error or "")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://hooks.example/", "invalid_webhook_url"),
        ("ftp://hooks.example/", "invalid_webhook_url"),
        ("file:///etc/passwd", "invalid_webhook_url"),
        ("https://user:pass@hooks.example/", "invalid_webhook_url"),
        ("https://hooks.example/\r\nx: y", "invalid_webhook_url"),
        ("https://", "invalid_webhook_url"),
        ("nonsense", "invalid_webhook_url"),
        ("https://127.0.0.1/", "webhook_address_not_allowed"),
        ("https://10.0.0.1/", "webhook_address_not_allowed"),
        ("https://[::1]/", "webhook_address_not_allowed"),
        ("https://[::ffff:169.254.169.254]/", "webhook_address_not_allowed"),
        ("https://localhost/", "webhook_address_not_allowed"),
        ("https://2130706433/", "webhook_address_not_allowed"),
        ("https://0/", "webhook_address_not_allowed"),
    ],
)
def test_addresses_that_are_refused_at_the_door(post: Post, url: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        post.hooks.create(WebhookRequest(url=url))
    assert (caught.value.code, caught.value.param) == (code, "url")
    assert post.hooks.list().data == []


def test_an_owner_has_so_many(post: Post, receiver: Receiver) -> None:
    for _ in range(MOST_PER_OWNER):
        hook = post.hooks.create(WebhookRequest(url=receiver.url))
    with pytest.raises(Conflict, match="delete one first") as caught:
        post.hooks.create(WebhookRequest(url=receiver.url))
    assert caught.value.code == "too_many_webhooks"
    post.end_a_job()
    post.hooks.delete(hook.id)
    assert len(post.hooks.list().data) == MOST_PER_OWNER - 1
    with pytest.raises(NotFound):
        post.hooks.deliveries(hook.id, limit=1)
