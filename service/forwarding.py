"""Chat and completions: the body goes to the inference process as it came, the answer comes back as it is."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from functools import partial

import anyio
import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from api_schemas.errors import ErrorResponse, Unavailable
from api_schemas.inference import COUNT_TOKENS
from service.deps import Stores

PASSED_BACK = ("content-type", "retry-after", "retry-after-ms", "x-should-retry")
STREAM = "text/event-stream"
TOLD = re.compile(rb"^: tokens (\d{1,9})$", re.MULTILINE)  # text of a model stands inside JSON: it begins no line
TAIL_BYTES = 512


async def forward(stores: Stores, request: Request, model: str, owner: str) -> Response:
    """Forward a checked request about a model that is ready.

    Raises:
        NotFound, Conflict: the model does not exist, or is not ready.
        Unavailable: the inference process does not answer.
        TooManyRequests: the owner's tokens of today are used up.
    """
    await run_in_threadpool(stores.quotas.require_tokens, owner)
    await run_in_threadpool(stores.models.path_of, model)
    headers = {"content-type": "application/json", "x-request-id": request.state.request_id, COUNT_TOKENS: "1"}
    body = await request.body()
    outgoing = stores.inference.build_request("POST", request.url.path, content=body, headers=headers)
    try:
        answer = await _until_disconnect(request, stores.inference, outgoing)
        passed = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers}
        if answer.headers.get("content-type", "").startswith(STREAM):
            relayed = _relay(answer, partial(stores.quotas.count_tokens, owner))
            return StreamingResponse(relayed, status_code=answer.status_code, headers=passed)
        if answer.status_code == 200:
            await run_in_threadpool(stores.quotas.count_tokens, owner, _tokens_of(answer.content))
        return Response(answer.content, status_code=answer.status_code, headers=passed)
    except httpx.TransportError as error:
        raise _unavailable(error) from error


async def _until_disconnect(request: Request, client: httpx.AsyncClient, outgoing: httpx.Request) -> httpx.Response:
    """Send and await the answer, whole unless it is a stream; when the caller leaves, the upstream call ends too."""
    sending = asyncio.create_task(_send(client, outgoing))
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            raise ClientDisconnect
        return sending.result()
    finally:
        sending.cancel()  # closes the connection to the inference process, which ends the generation there
        watching.cancel()


async def _send(client: httpx.AsyncClient, outgoing: httpx.Request) -> httpx.Response:
    answer = await client.send(outgoing, stream=True)
    if not answer.headers.get("content-type", "").startswith(STREAM):
        await answer.aread()
    return answer


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _tokens_of(content: bytes) -> int:
    usage = json.loads(content).get("usage") or {}
    return int(usage.get("total_tokens", 0))


async def _relay(answer: httpx.Response, count: Callable[[int], None]) -> AsyncIterator[bytes]:
    """Pass a stream on and count its tokens: as its end says, or, when it is cut short, at least one per line."""
    tail, lines = b"", 0
    try:
        async for chunk in answer.aiter_raw():
            tail, lines = (tail + chunk)[-TAIL_BYTES:], lines + chunk.count(b"data: {")
            yield chunk
    except httpx.TransportError as error:
        # The status line is out, so the error travels in the stream, as clients of OpenAI's streams expect.
        body = ErrorResponse(error=_unavailable(error).body())
        yield f"data: {json.dumps(body.model_dump())}\n\n".encode()
    finally:
        told = TOLD.findall(tail)
        with anyio.CancelScope(shield=True):
            await answer.aclose()
            await run_in_threadpool(count, int(told[-1]) if told else lines)


def _unavailable(error: httpx.TransportError) -> Unavailable:
    message = f"the inference process does not answer ({type(error).__name__}); see GET /readyz and try again"
    return Unavailable("inference_unavailable", message)
