"""Alembic's entry: migrates the connection that `everlearn.store.db.migrate` hands over, inside its transaction."""

from __future__ import annotations

from alembic import context

from everlearn.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
