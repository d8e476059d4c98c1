"""The ledger's tables, and how it knows rows: classes of rows that were always released together.

A shard that is met for the first time may have some rows of a class and not the others. The class is divided then, and
both parts keep what was spent on them. So what a row has lost follows the row into every subset and superset, and the
tables grow with the rows that were ever released from once, not with rows times releases.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

SCHEMA_VERSION = 1

# Of a row's SHA-256; no two rows of any site share so much of it.
DIGEST_BYTES = 16

SCHEMA = (
    """
    CREATE TABLE releases (
        id INTEGER PRIMARY KEY, time TEXT NOT NULL, run_id TEXT NOT NULL, task_id TEXT NOT NULL, release TEXT NOT NULL,
        unit TEXT NOT NULL, noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL,
        replaced INTEGER NOT NULL, sensitivity REAL, clip_norm REAL NOT NULL, released INTEGER NOT NULL,
        dimension INTEGER NOT NULL, delta REAL NOT NULL, epsilon REAL, digest TEXT NOT NULL, payload BLOB,
        set_id INTEGER NOT NULL
    ) STRICT
    """,
    "CREATE INDEX releases_task ON releases (run_id, task_id)",
    "CREATE TABLE sets (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, rows INTEGER NOT NULL) STRICT",
    "CREATE TABLE classes (id INTEGER PRIMARY KEY, rows INTEGER NOT NULL) STRICT",
    "CREATE TABLE rows (digest BLOB PRIMARY KEY, class INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE set_classes (set_id INTEGER, class INTEGER, PRIMARY KEY (set_id, class)) STRICT, WITHOUT ROWID",
    "CREATE TABLE spends (class INTEGER, release INTEGER, PRIMARY KEY (class, release)) STRICT, WITHOUT ROWID",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


def register(db: sqlite3.Connection, key: str, digests: Iterable[bytes]) -> int:
    """The set of the rows with these digests, whose digest together is `key`; `digests` is read only for a new one.

    Memory does not grow with the rows: they go through a temporary table on disk.
    """
    known = db.execute("SELECT id FROM sets WHERE key = ?", [key]).fetchone()
    if known:
        return int(known[0])
    db.execute("CREATE TEMP TABLE incoming (digest BLOB PRIMARY KEY) WITHOUT ROWID")
    db.executemany("INSERT OR IGNORE INTO incoming VALUES (?)", ((digest[:DIGEST_BYTES],) for digest in digests))
    (rows,) = db.execute("SELECT COUNT(*) FROM incoming").fetchone()
    number = db.execute("INSERT INTO sets (key, rows) VALUES (?, ?)", [key, rows]).lastrowid
    met = db.execute(
        "SELECT class, COUNT(*), classes.rows FROM incoming JOIN rows USING (digest) JOIN classes ON id = class "
        "GROUP BY class"
    ).fetchall()
    db.execute("CREATE TEMP TABLE divided (whole INTEGER PRIMARY KEY, part INTEGER)")
    for whole, count, all_rows in met:
        part = whole if count == all_rows else _divide(db, whole, count)
        db.execute("INSERT INTO set_classes VALUES (?, ?)", [number, part])
    db.execute(
        "UPDATE rows SET class = (SELECT part FROM divided WHERE whole = class) "
        "WHERE digest IN (SELECT digest FROM incoming) AND class IN (SELECT whole FROM divided)"
    )
    fresh = rows - sum(count for _, count, _ in met)
    if fresh:
        part = db.execute("INSERT INTO classes (rows) VALUES (?)", [fresh]).lastrowid
        db.execute(
            "INSERT INTO rows SELECT digest, ? FROM incoming WHERE digest NOT IN (SELECT digest FROM rows)", [part]
        )
        db.execute("INSERT INTO set_classes VALUES (?, ?)", [number, part])
    db.execute("DROP TABLE divided")
    db.execute("DROP TABLE incoming")
    assert number is not None
    return number


def _divide(db: sqlite3.Connection, whole: int, count: int) -> int:
    """A class for the `count` rows of the class `whole` that are incoming, with the history of `whole`."""
    part = db.execute("INSERT INTO classes (rows) VALUES (?)", [count]).lastrowid
    assert part is not None
    db.execute("UPDATE classes SET rows = rows - ? WHERE id = ?", [count, whole])
    db.execute("INSERT INTO spends SELECT ?, release FROM spends WHERE class = ?", [part, whole])
    db.execute("INSERT INTO set_classes SELECT set_id, ? FROM set_classes WHERE class = ?", [part, whole])
    db.execute("INSERT INTO divided VALUES (?, ?)", [whole, part])
    return part
