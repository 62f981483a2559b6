"""Webhooks in the form of Standard Webhooks 1.0: who is told of the end of a job, and whether that arrived."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen

WebhookEvent = Literal["compression.job.succeeded", "compression.job.failed", "compression.job.cancelled"]


class WebhookRequest(Frozen):
    """Body of `POST /v1/webhooks`."""

    url: Annotated[str, Field(min_length=1, max_length=2048, description="https://host/path on the public internet")]
    events: Annotated[
        tuple[WebhookEvent, ...], Field(min_length=1, max_length=3, description="which ends of jobs are told")
    ] = ("compression.job.succeeded", "compression.job.failed", "compression.job.cancelled")


class Webhook(Frozen):
    """A webhook without its secret."""

    id: str
    object: Literal["webhook"] = "webhook"
    created_at: int
    owner: str
    url: str
    events: tuple[WebhookEvent, ...]
    disabled: Annotated[str | None, Field(description="why nothing is sent any more: the receiver answered 410")]


class NewWebhook(Webhook):
    """A webhook just made, with the secret that is never shown again."""

    secret: Annotated[str, Field(description="whsec_ and 256 bits in base64: signs each message (HMAC-SHA256)")]


class Delivery(Frozen):
    """One message to one webhook, and how it fared."""

    id: Annotated[str, Field(description="the header `webhook-id`; the same at each try")]
    object: Literal["webhook.delivery"] = "webhook.delivery"
    created_at: int
    job: str
    type: WebhookEvent
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    next_attempt_at: int | None
    last_status: Annotated[int | None, Field(description="what the receiver answered")]
    last_error: Annotated[str | None, Field(description="why the last try failed")]
