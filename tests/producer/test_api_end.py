"""The API's tasks end with it, whatever becomes of a cancellation on its way."""

import asyncio

from hortator.producer.api.app import end


def test_a_task_that_a_library_robs_of_its_cancellation_is_cancelled_again() -> None:
    robbed = 0

    async def stubborn() -> None:
        nonlocal robbed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                robbed += 1
                if robbed == 2:
                    raise

    async def scenario() -> None:
        tasks = [asyncio.create_task(stubborn()), asyncio.create_task(asyncio.sleep(60))]
        await asyncio.sleep(0)
        await asyncio.wait_for(end(tasks), 5)
        assert all(task.cancelled() for task in tasks)

    asyncio.run(scenario())
    assert robbed == 2
