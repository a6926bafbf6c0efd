"""What Alembic runs for every upgrade: the changes, over the connection and in the transaction that it is given."""

from __future__ import annotations

from alembic import context

from gradmem.store.migrations import TABLE

context.configure(connection=context.config.attributes["connection"], version_table=TABLE)
context.run_migrations()
