"""Quotas of owners, tokens per day, and limits of single keys.

Revision: 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op


revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "quotas",
        sa.Column("owned_by", sa.String(length=64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("jobs", sa.Integer(), nullable=True),
        sa.Column("tokens", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("owned_by"),
    )
    op.create_table(
        "tokens",
        sa.Column("owned_by", sa.String(length=64), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owned_by", "day"),
    )
    op.add_column("api_keys", sa.Column("requests_per_minute", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("concurrent_requests", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("api_keys", "concurrent_requests")
    op.drop_column("api_keys", "requests_per_minute")
    op.drop_table("tokens")
    op.drop_table("quotas")
