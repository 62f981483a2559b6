"""What a running job says of itself, and how often it ran out of memory.

Revision: 0003, after 0002.
"""

import sqlalchemy as sa
from alembic import op


revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("heartbeat", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("memory_retries", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("jobs", "memory_retries")
    op.drop_column("jobs", "heartbeat")
