"""Changes of the tables of a store, in the order of their numbers; Alembic runs them."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection

HEAD = "4"
"""Number of the last change, which new tables have from the beginning."""
TABLE = "gradmem_schema"
"""Table in which Alembic keeps the number of the last change that was made."""


def upgrade(connection: Connection) -> None:
    """Make all changes that the tables lack, in the transaction of the connection."""
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    command.upgrade(config, "head")
