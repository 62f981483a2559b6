"""Alembic's entry point. `job_store.database.upgrade` hands over an open connection and its transaction."""

from alembic import context

from job_store.tables import Base


def run() -> None:
    """Run the migrations on the connection that the caller opened and will commit."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


run()
