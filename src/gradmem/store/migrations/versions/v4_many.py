"""Prepare for many memories: payloads as objects outside the database, and totals that need not be counted."""

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"

TOTALS = """
INSERT INTO gradmem_owners (owner, memories, bytes)
SELECT owner, SUM(number), SUM(size) FROM (
    SELECT owner, 1 AS number, bytes AS size FROM gradmem_memories
    UNION ALL SELECT owner, CASE WHEN memory IS NULL THEN 1 ELSE 0 END, size FROM gradmem_files
) AS every GROUP BY owner
"""


def upgrade() -> None:
    """Add the tables and the column, and drop the indexes that nothing uses any more."""
    op.create_table(
        "gradmem_owners",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("memories", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )
    op.execute(TOTALS)
    op.create_table(
        "gradmem_settings",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.add_column("gradmem_versions", sa.Column("object", sa.String))
    there = sa.text("object IS NOT NULL")
    op.create_index(
        "gradmem_versions_object",
        "gradmem_versions",
        ["object"],
        unique=True,
        postgresql_where=there,
        sqlite_where=there,
    )
    op.drop_index("gradmem_memories_quota", "gradmem_memories")
    op.drop_index("gradmem_memories_name", "gradmem_memories")
