"""From messages to files: order, places, shared limits, and what happens while hosts are slow."""

import asyncio
import base64
import threading

import pytest
from pydantic import TypeAdapter

from api_schemas.errors import InvalidRequest
from api_schemas.inference import Message
from job_store.settings import Settings
from tests.tiny_vision_models import encoded, picture
from tests.workers.inference.test_image_fetching import Host, sends
from tests.workers.inference.test_image_urls import PUBLIC
from workers.inference.images.fetching import Fetcher
from workers.inference.images.reading import FETCHING, ImageReader, image_parts
from workers.inference.queueing import QueueFull

FILES = [encoded(picture(seed)) for seed in range(3)]
HOSTS = frozenset({"images.example.org"})
REMOTE = "http://images.example.org/x.png"


def inline(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def reader(fetcher=None, **values):
    return ImageReader(Settings(**values), fetcher)


def read(reader, *urls):
    return asyncio.run(reader.read([(f"place.{at}", url) for at, url in enumerate(urls)]))


def refusal(reader, *urls):
    with pytest.raises(InvalidRequest) as caught:
        read(reader, *urls)
    return caught.value


@pytest.fixture
def stuck():
    """A fetcher whose resolver answers no sooner than the test ends."""
    released = threading.Event()

    def resolve(*_):
        released.wait(60)
        return []

    yield Fetcher(HOSTS, resolve=resolve)
    released.set()


def test_places_and_order():
    def part(url):
        return {"type": "image_url", "image_url": {"url": url}}

    content = [{"type": "text", "text": "a"}, part("x"), part("y")]
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    turns += [{"role": "user", "content": [part("z")]}]
    found = image_parts(TypeAdapter(list[Message]).validate_python(turns))
    assert found == [("messages.1.content.1", "x"), ("messages.1.content.2", "y"), ("messages.2.content.0", "z")]


def test_files_come_in_order_from_both_sources():
    host = Host([sends("200 OK", FILES[1])], secure=False)
    mixed = reader(Fetcher(HOSTS, resolve=lambda *_: [PUBLIC], dial=host.dial))
    files = read(mixed, inline(FILES[0]), REMOTE, inline(FILES[2]))
    host.close()
    assert [file.data for file in files] == FILES
    assert [file.place for file in files] == ["place.0", "place.1", "place.2"]


def test_all_images_share_the_bytes():
    total = sum(map(len, FILES))
    assert len(read(reader(max_image_bytes=total), *map(inline, FILES))) == 3
    error = refusal(reader(max_image_bytes=total - 1), *map(inline, FILES))
    assert (error.code, error.param) == ("image_too_large", "place.2")
    assert str(len(FILES[2]) - 1) in error.message


def test_a_fetched_image_has_what_the_others_left():
    host = Host([sends("200 OK", FILES[1])], secure=False)
    fetcher = Fetcher(HOSTS, resolve=lambda *_: [PUBLIC], dial=host.dial)
    error = refusal(reader(fetcher, max_image_bytes=len(FILES[0]) + len(FILES[1]) - 1), inline(FILES[0]), REMOTE)
    host.close()
    assert (error.code, error.param) == ("image_too_large", "place.1")


def test_no_images_at_all_when_the_operator_says_so():
    assert refusal(reader(max_images=0), inline(FILES[0])).code == "too_many_images"


def test_a_resolver_that_hangs_is_given_up(stuck):
    error = refusal(reader(stuck, image_fetch_seconds=0.1), REMOTE)
    assert (error.code, error.param) == ("image_fetch_failed", "messages")


def test_few_fetch_at_once_some_wait_and_one_more_is_told_to_come_back(stuck):
    slow = reader(stuck, inference_max_waiting=2, image_fetch_seconds=0.5)

    async def crowd():
        asked = [slow.read([("p", REMOTE)]) for _ in range(FETCHING + 3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    outcomes = asyncio.run(crowd())
    assert sum(isinstance(one, QueueFull) for one in outcomes) == 1
    assert {type(one) for one in outcomes} == {QueueFull, InvalidRequest}


def test_images_in_the_request_never_wait_for_slow_hosts(stuck):
    slow = reader(stuck, inference_max_waiting=1, image_fetch_seconds=0.3)

    async def crowd():
        hanging = [asyncio.create_task(slow.read([("p", REMOTE)])) for _ in range(FETCHING)]
        await asyncio.sleep(0)
        files = await slow.read([("p", inline(FILES[0]))])
        assert not any(task.done() for task in hanging)
        await asyncio.gather(*hanging, return_exceptions=True)
        return files

    assert asyncio.run(crowd())[0].data == FILES[0]
