"""`/v1/chat/completions` and `/v1/completions`: checked here, answered by the inference process."""

from fastapi import APIRouter, Request, Response

from api_schemas.inference import ChatRequest, CompletionRequest
from service.deps import CallerOf, StoresOf
from service.forwarding import forward
from service.openapi import ANSWERED

router = APIRouter(prefix="/v1", tags=["inference"])


@router.post("/chat/completions", response_class=Response, responses=ANSWERED)
async def chat(body: ChatRequest, request: Request, stores: StoresOf, caller: CallerOf) -> Response:
    """Answer a conversation."""
    return await forward(stores, request, body.model, caller.owner)


@router.post("/completions", response_class=Response, responses=ANSWERED)
async def complete(body: CompletionRequest, request: Request, stores: StoresOf, caller: CallerOf) -> Response:
    """Continue a text."""
    return await forward(stores, request, body.model, caller.owner)
