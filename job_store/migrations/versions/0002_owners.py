"""Owners of everything that clients see, and the scopes of keys.

What is there already belongs to the owner `default`, and keys made before may do everything, as they could.

Revision: 0002, after 0001.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op


revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

OWNED = ("files", "uploads", "models", "jobs", "api_keys")


def upgrade() -> None:
    for table in OWNED:
        op.add_column(table, _owned_by())
    op.add_column("api_keys", sa.Column("scopes", sa.JSON(), server_default='["admin"]', nullable=False))
    for table in ("files", "models", "jobs"):
        op.create_index(f"{table}_by_owner", table, ["owned_by", "created_at", "id"], unique=False)
    # Keys of idempotency count per owner: a primary key changes, so the table is built anew.
    op.create_table("owned_idempotency_keys", _owned_by(), *_idempotency(), sa.PrimaryKeyConstraint("owned_by", "key"))
    _copy("owned_idempotency_keys", "idempotency_keys")


def downgrade() -> None:
    op.create_table("plain_idempotency_keys", *_idempotency(), sa.PrimaryKeyConstraint("key"))
    _copy("plain_idempotency_keys", "idempotency_keys")
    for table in ("files", "models", "jobs"):
        op.drop_index(f"{table}_by_owner", table)
    op.drop_column("api_keys", "scopes")
    for table in OWNED:
        op.drop_column(table, "owned_by")


def _owned_by() -> sa.Column[str]:
    return sa.Column("owned_by", sa.String(length=64), server_default="default", nullable=False)


def _idempotency() -> list[sa.Column[Any]]:
    return [
        sa.Column("key", sa.String(length=256), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=True),
    ]


def _copy(new: str, old: str) -> None:
    where = "" if new.startswith("owned") else "WHERE owned_by = 'default'"
    op.execute(
        f"INSERT INTO {new} (key, created_at, fingerprint, job_id) "
        f"SELECT key, created_at, fingerprint, job_id FROM {old} {where}"
    )
    op.drop_table(old)
    op.rename_table(new, old)
