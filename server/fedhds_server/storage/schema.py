"""The tables of the SQL store, and how a database gets them: by the migrations beside this file, in order."""

from __future__ import annotations

import functools
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fedhds.errors import StorageError

METADATA = sa.MetaData()
RUN = sa.Table(
    "run",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("format", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
)
JOURNAL = sa.Table(
    "journal",
    METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("trouble", sa.Boolean, nullable=False),
)
# One row, which the migration makes. `token` goes up with every change of leader: the fencing token.
LEASE = sa.Table(
    "lease",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("address", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
)

_MIGRATIONS = Path(__file__).with_name("migrations")
# Of the stores that were made before there were migrations.
_UNMARKED = "0001"


def is_current(connection: sa.Connection) -> bool:
    """Whether the database has this program's tables: neither an older backup's nor those of a newer program."""
    return MigrationContext.configure(connection).get_current_revision() == _head()


@functools.cache
def _head() -> str | None:
    return ScriptDirectory(str(_MIGRATIONS)).get_current_head()


def upgrade(connection: sa.Connection) -> None:
    """Gives the database this program's tables, within the transaction of `connection`; keeps what is in them.

    Raises StorageError for the database of a newer program.
    """
    config = Config()
    # The option is a template of configparser.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    script = ScriptDirectory.from_config(config)
    current = MigrationContext.configure(connection).get_current_revision()
    if current == script.get_current_head():
        return
    if current is None and sa.inspect(connection).has_table(RUN.name):
        command.stamp(config, _UNMARKED)
    elif current is not None and current not in {revision.revision for revision in script.walk_revisions()}:
        raise StorageError(
            f"the state database has schema {current}, this program knows up to {script.get_current_head()}; use the "
            "version that wrote it"
        )
    command.upgrade(config, "head")
