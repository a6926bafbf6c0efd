"""The first tables: memories, versions and tags. No store is made from them any more."""

revision = "1"
down_revision = None


def upgrade() -> None:
    """Change nothing: the tables are there."""
