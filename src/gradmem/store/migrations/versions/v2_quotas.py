"""Add the bytes of each memory, for quotas, and what was not measured and which answers are at risk."""

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    """Add the columns, and sum up the bytes."""
    op.add_column("gradmem_memories", sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("gradmem_versions", sa.Column("unmeasured", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("gradmem_versions", sa.Column("answers", sa.BigInteger))
    op.add_column("gradmem_versions", sa.Column("at_risk", sa.BigInteger))
    op.execute(
        "UPDATE gradmem_memories SET bytes = "
        "(SELECT COALESCE(SUM(size), 0) FROM gradmem_versions WHERE memory = gradmem_memories.id)"
    )
    op.create_index("gradmem_memories_quota", "gradmem_memories", ["owner", "bytes"])
