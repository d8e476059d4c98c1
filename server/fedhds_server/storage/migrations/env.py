"""What alembic runs: the migrations, in the transaction that the caller has opened."""

from __future__ import annotations

from alembic import context

# SQLite can undo DDL as well, which alembic does not expect of it.
context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
