"""Alembic migrations; `job_store.database.upgrade` runs them."""
