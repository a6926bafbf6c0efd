"""Add text files."""

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    """Add the table of text files."""
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "gradmem_files",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("path", sa.String().with_variant(sa.String(collation="C"), "postgresql"), primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created", moment, nullable=False),
        sa.Column("updated", moment, nullable=False),
        sa.Column("memory", sa.String(32), sa.ForeignKey("gradmem_memories.id", ondelete="SET NULL")),
    )
    op.create_index("ix_gradmem_files_memory", "gradmem_files", ["memory"])
