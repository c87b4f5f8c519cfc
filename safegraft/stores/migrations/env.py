"""What Alembic runs. There is no alembic.ini: `safegraft.stores.migrations` hands over the connection and the tables.

The connection is in a transaction of whoever opened it, which holds all revisions: they happen together or not at all.
"""

from alembic import context

given = context.config.attributes
context.configure(
    connection=given["connection"],
    target_metadata=given.get("metadata"),
    # SQLite cannot alter most of a table; Alembic then copies it. On Postgres the same code alters in place.
    render_as_batch=given.get("batch", True),
    process_revision_directives=given.get("directives"),
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
