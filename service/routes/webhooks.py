"""`/v1/webhooks`: who is told when a job ends."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from api_schemas.listing import Page
from api_schemas.models import Deleted
from api_schemas.webhooks import Delivery, NewWebhook, Webhook, WebhookRequest
from service.deps import StoresOf

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])


@router.post("", status_code=201)
def create_webhook(body: WebhookRequest, stores: StoresOf, response: Response) -> NewWebhook:
    """Register an address that is told when a job of the owner ends; the answer shows the signing secret once."""
    made = stores.webhooks.create(body)
    response.headers["location"] = f"/v1/webhooks/{made.id}"
    return made


@router.get("")
def list_webhooks(stores: StoresOf) -> Page[Webhook]:
    """List the webhooks."""
    return stores.webhooks.list()


@router.get("/{webhook_id}")
def get_webhook(webhook_id: str, stores: StoresOf) -> Webhook:
    """Read a webhook."""
    return stores.webhooks.get(webhook_id)


@router.delete("/{webhook_id}")
def delete_webhook(webhook_id: str, stores: StoresOf) -> Deleted:
    """Delete a webhook; what it was still to be told is dropped."""
    stores.webhooks.delete(webhook_id)
    return Deleted(id=webhook_id, object="webhook")


@router.get("/{webhook_id}/deliveries")
def list_deliveries(
    webhook_id: str, stores: StoresOf, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Page[Delivery]:
    """List the newest messages to a webhook, and how they fared."""
    return stores.webhooks.deliveries(webhook_id, limit=limit)
