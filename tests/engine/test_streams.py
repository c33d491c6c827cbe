"""A request's outputs reach a reader that is late, whole and in order."""

from __future__ import annotations

import pytest

from engine.messages import RequestOutput
from engine.streams import Stream


def output(number: int) -> RequestOutput:
    return RequestOutput(
        request_id="a",
        text=f"{number} ",
        token_ids=[number],
        num_prompt_tokens=1,
        num_cached_tokens=0,
        num_output_tokens=number + 1,
    )


@pytest.mark.parametrize("num_first", [1, 16, 17, 40, 200])
@pytest.mark.parametrize("num_read_each", [1, 3])
async def test_outputs_keep_their_order_however_late_they_are_read(num_first: int, num_read_each: int):
    stream, got, num_put = Stream(), [], 0

    async def read() -> None:
        got.append(await stream.get())

    for _ in range(num_first):
        stream.put(output(num_put))
        num_put += 1
    for _ in range(30):  # the reader takes some, and others come
        for _ in range(num_read_each):
            if not got or got[-1].num_output_tokens < num_put:
                await read()
        stream.put(output(num_put))
        num_put += 1
    while got[-1].num_output_tokens < num_put:
        await read()
    assert [token for one in got for token in one.token_ids] == list(range(num_put))
    assert "".join(one.text for one in got) == "".join(f"{i} " for i in range(num_put))
    counts = [one.num_output_tokens for one in got]
    assert counts == sorted(counts)
