"""How long blocks took, and on which workers.

Revision: 0007, after 0006.
"""

import sqlalchemy as sa
from alembic import op


revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "block_times",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("block", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(length=64), nullable=True),
        sa.Column("worker_class", sa.String(length=256), nullable=False),
        sa.Column("kind", sa.String(length=400), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("slow", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("block_times_by_kind", "block_times", ["worker_class", "kind", "id"], unique=False)


def downgrade() -> None:
    op.drop_index("block_times_by_kind", "block_times")
    op.drop_table("block_times")
