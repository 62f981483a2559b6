"""The line: in order, bounded, and never leaking a place."""

import asyncio

import pytest

from workers.inference.queueing import QueueFull, WaitingLine


def nothing():
    """Admission needs no note here."""


async def occupy(line, order, name, release):
    async with line.turn(nothing):
        order.append(name)
        await release.wait()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_turns_come_in_order_of_arrival_and_one_more_than_may_wait_is_refused():
    async def scenario():
        line, order, release = WaitingLine(max_waiting=2), [], asyncio.Event()
        tasks = []
        for name in "abc":
            tasks.append(asyncio.create_task(occupy(line, order, name, release)))
            await settle()
        assert (order, line.running, line.waiting) == (["a"], 1, 2)
        with pytest.raises(QueueFull) as caught:
            async with line.turn(nothing):
                raise AssertionError("admitted")
        assert caught.value.status == 429
        assert caught.value.retry_after >= 1
        release.set()
        await asyncio.gather(*tasks)
        assert (order, line.running, line.waiting) == (["a", "b", "c"], 0, 0)

    asyncio.run(scenario())


def test_one_who_gives_up_waiting_leaves_the_line():
    async def scenario():
        line, order, release = WaitingLine(max_waiting=1), [], asyncio.Event()
        first = asyncio.create_task(occupy(line, order, "first", release))
        await settle()
        second = asyncio.create_task(occupy(line, order, "second", release))
        await settle()
        second.cancel()
        await settle()
        assert line.waiting == 0
        third = asyncio.create_task(occupy(line, order, "third", release))
        await settle()
        release.set()
        await asyncio.gather(first, third)
        assert order == ["first", "third"]

    asyncio.run(scenario())


def test_a_body_that_raises_gives_its_place_back():
    async def scenario():
        line = WaitingLine(max_waiting=1)
        with pytest.raises(KeyError):
            async with line.turn(nothing):
                raise KeyError
        async with line.turn(nothing):
            assert line.running == 1

    asyncio.run(scenario())
