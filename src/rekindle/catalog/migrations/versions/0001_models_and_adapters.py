"""Models, adapters and their versions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Build the first tables."""
    state = op.create_table(
        "catalog_state",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(state, [{"id": 1, "generation": 0}])
    op.create_table(
        "models",
        sa.Column("name", sa.String(256), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False, index=True),
        sa.Column("manifest", sa.JSON, nullable=False),
        sa.Column("created_s", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(256), primary_key=True),
        sa.Column("base_name", sa.String(256), sa.ForeignKey("models.name"), nullable=False, index=True),
        sa.Column("version", sa.Integer, nullable=False),
    )
    op.create_table(
        "adapter_versions",
        sa.Column("adapter_name", sa.String(256), sa.ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(64), nullable=False, index=True),
        sa.Column("base_digest", sa.String(64), nullable=False),
        sa.Column("manifest", sa.JSON, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("created_s", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Drop everything."""
    for table in ("adapter_versions", "adapters", "models", "catalog_state"):
        op.drop_table(table)
