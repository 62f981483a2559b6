"""Chat and completions: the body goes to the inference process as it came, the answer comes back as it is."""

import asyncio
import json
from collections.abc import AsyncIterator

import anyio
import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from api_schemas.errors import ErrorResponse, Unavailable
from service.deps import Stores

PASSED_BACK = ("content-type", "retry-after", "retry-after-ms", "x-should-retry")
STREAM = "text/event-stream"


async def forward(stores: Stores, request: Request, model: str) -> Response:
    """Forward a checked request about a model that is ready.

    Raises:
        NotFound, Conflict: the model does not exist, or is not ready.
        Unavailable: the inference process does not answer.
    """
    await run_in_threadpool(stores.models.path_of, model)
    headers = {"content-type": "application/json", "x-request-id": request.state.request_id}
    body = await request.body()
    outgoing = stores.inference.build_request("POST", request.url.path, content=body, headers=headers)
    try:
        answer = await _until_disconnect(request, stores.inference, outgoing)
        passed = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers}
        if answer.headers.get("content-type", "").startswith(STREAM):
            return StreamingResponse(_relay(answer), status_code=answer.status_code, headers=passed)
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


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    except httpx.TransportError as error:
        # The status line is out, so the error travels in the stream, as clients of OpenAI's streams expect.
        body = ErrorResponse(error=_unavailable(error).body())
        yield f"data: {json.dumps(body.model_dump())}\n\n".encode()
    finally:
        with anyio.CancelScope(shield=True):
            await answer.aclose()


def _unavailable(error: httpx.TransportError) -> Unavailable:
    message = f"the inference process does not answer ({type(error).__name__}); see GET /readyz and try again"
    return Unavailable("inference_unavailable", message)
