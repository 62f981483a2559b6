"""Faults thrown at real jobs, at random moments: `python -m tests.chaos`, or `make chaos`."""
