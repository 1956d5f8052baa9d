"""The size of a report stands beside it, so that a tenant's reports can be added up."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("telemetry", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE telemetry SET bytes = length(CAST(body AS TEXT))")
    op.drop_index("telemetry_tenant", "telemetry")
    op.create_index("telemetry_tenant", "telemetry", ["tenant", "id", "bytes"])


def downgrade() -> None:
    op.drop_index("telemetry_tenant", "telemetry")
    op.drop_column("telemetry", "bytes")
    op.create_index("telemetry_tenant", "telemetry", ["tenant", "id"])
