"""Workers, what they found of themselves, and how long blocks took them.

Revision: 0005, after 0004.
"""

import sqlalchemy as sa
from alembic import op


revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("worker_class", sa.String(length=256), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.Column("stopped_at", sa.Float(), nullable=True),
        sa.Column("standing", sa.String(length=16), nullable=False),
        sa.Column("slow_blocks", sa.Integer(), nullable=False),
        sa.Column("checks", sa.JSON(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("workers_by_class", "workers", ["worker_class", "started_at"], unique=False)


def downgrade() -> None:
    op.drop_index("workers_by_class", "workers")
    op.drop_table("workers")
