"""A site's rows: read once from any known file, checked, and then read row by row from a spool on disk."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from fedhds.errors import DataError
from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.row_formats import Row, is_task_file, recognized, task_rows

_MAX_REASONS = 10
_ENDINGS = ".jsonl, .jsonl.gz, .json, .json.gz, .parquet"


class Shard:
    """Rows of one file, by id 0 to len - 1. Memory: eight bytes a row; the text is in an unnamed file on disk."""

    def __init__(self, path: Path, spool: IO[bytes]) -> None:
        self.path = path
        self.skipped = 0
        self.skipped_reasons: list[tuple[int, str]] = []
        """Line (or row of a list or table, from 1) and reason of the first rows that were skipped."""
        self.categories: Counter[str] = Counter()
        self.digest = ""
        """SHA-256 over the digests of all rows."""
        self._spool = spool
        self._offsets = array("Q", [0])

    @classmethod
    def open(cls, path: Path, *, skip_bad_rows: bool = False, spool_dir: Path | None = None) -> Shard:
        """Reads and checks a whole file; raises DataError naming file, line and reason.

        With `skip_bad_rows` a bad row is counted and left out; a file that cannot be read at all is an error still.
        """
        spool = cast(IO[bytes], tempfile.TemporaryFile(dir=spool_dir))  # noqa: SIM115 - the shard closes it
        shard = cls(path, spool)
        try:
            shard._fill(skip_bad_rows)
        except OSError as error:
            spool.close()
            raise DataError(path, f"cannot be read: {error.strerror or error}") from error
        except DataError:
            spool.close()
            raise
        return shard

    def leave_out(
        self, check: Callable[[Row], None], progress: Callable[[float], None] = lambda share: None
    ) -> tuple[int, list[tuple[int, str]]]:
        """Skips the rows for which `check` raises BadRow; ids, categories and digest are those of the others then.

        Answers how many these are, with line and reason of the first ones. `progress` gets the share of the rows that
        were checked. Nothing else may read the shard meanwhile.
        """
        rows = len(self)
        refused: list[tuple[int, str]] = []

        def keeps(number: int, line: int, row: Row) -> bool:
            progress((number + 1) / rows)
            try:
                check(row)
            except BadRow as fault:
                self._skip(line, str(fault))
                if len(refused) < _MAX_REASONS:
                    refused.append((line, str(fault)))
                return False
            return True

        self._keep(keeps)
        return rows - len(self), refused

    def hold_out(self, share: float, seed: int, spool_dir: Path | None = None) -> Shard:
        """Moves a share of the rows, drawn by `seed`, into a shard of its own; equal rows stay together.

        The draw depends on the rows' content and not on their order. Raises DataError when no row would be left here.
        """
        keys = array("Q", (_draw_key(row, seed) for row in self))
        last = sorted(keys)[max(1, round(share * len(keys))) - 1]
        if max(keys) <= last:
            raise DataError(self.path, f"a holdout of {share:g} leaves no row to train on; give more rows, or less")
        spool = cast(IO[bytes], tempfile.TemporaryFile(dir=spool_dir))  # noqa: SIM115 - the shard closes it
        part, digest = Shard(self.path, spool), hashlib.sha256()

        def keeps(number: int, line: int, row: Row) -> bool:
            if keys[number] > last:
                return True
            part._add(line, replace(row, id=len(part)), digest)
            return False

        self._keep(keeps)
        spool.flush()
        part.digest = digest.hexdigest()
        return part

    def shared(self, other: Shard) -> list[int]:
        """Lines of the rows that `other` has, too."""
        known = {row.digest for row in other}
        restored = (_restored(number, self._stored(number)) for number in range(len(self)))
        return [line for line, row in restored if row.digest in known]

    def _keep(self, keeps: Callable[[int, int, Row], bool]) -> None:
        """Leaves the rows that `keeps` wants, which gets their number before, their line and content."""
        digest, offsets, rows = hashlib.sha256(), array("Q", [0]), len(self)
        self.categories.clear()
        for number in range(rows):
            stored = self._stored(number)
            line, row = _restored(len(offsets) - 1, stored)
            if keeps(number, line, row):
                # Never behind where it was, so nothing that is still to be read is overwritten.
                os.pwrite(self._spool.fileno(), stored, offsets[-1])
                offsets.append(offsets[-1] + len(stored))
                self._count(row, digest)
        self._offsets, self.digest = offsets, digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return _restored(number, self._stored(number))[1]

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases the spool."""
        self._spool.close()

    def _fill(self, skip_bad_rows: bool) -> None:
        digest = hashlib.sha256()
        for line, _, content in read_rows(self.path):
            if isinstance(content, BadRow):
                if not skip_bad_rows:
                    raise DataError(
                        self.path, f"{content}; fix the row, or leave such rows out with --skip-bad-rows", line
                    )
                self._skip(line, str(content))
                continue
            self._add(line, Row.from_content(len(self), content), digest)
        self._spool.flush()
        self.digest = digest.hexdigest()
        if not len(self) and not self.skipped:
            raise DataError(self.path, "the file is empty; a shard needs at least one row")
        if not len(self):
            reason = self.skipped_reasons[0][1]
            raise DataError(self.path, f"none of its {self.skipped} rows can be used; the first: {reason}")

    def _add(self, line: int, row: Row, digest: hashlib._Hash) -> None:
        self._count(row, digest)
        stored = f"{line} {json.dumps(row.content())}".encode()
        self._spool.write(stored)
        self._offsets.append(self._offsets[-1] + len(stored))

    def _skip(self, line: int, reason: str) -> None:
        self.skipped += 1
        if len(self.skipped_reasons) < _MAX_REASONS:
            self.skipped_reasons.append((line, reason))

    def _count(self, row: Row, digest: hashlib._Hash) -> None:
        self.categories[row.category] += 1
        digest.update(bytes.fromhex(row.digest))

    def _stored(self, number: int) -> bytes:
        begin, end = self._offsets[number], self._offsets[number + 1]
        # pread: the position of the file is shared by threads, this call's is not.
        return os.pread(self._spool.fileno(), end - begin, begin)


def _draw_key(row: Row, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{row.digest}".encode()).digest()[:8])


def _restored(number: int, stored: bytes) -> tuple[int, Row]:
    """Line and row, as the spool keeps them."""
    line, _, content = stored.partition(b" ")
    return int(line), Row.from_content(number, json.loads(content))


def read_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any] | BadRow]]:
    """All rows of a file: line (of a list or table: number, from 1), format, and the content, or why there is none.

    Raises DataError for a file that cannot be read as rows.
    """
    if path.is_dir():
        raise DataError(path, "is a folder; name a file in it")
    if not path.exists():
        raise DataError(path, "there is no such file")
    try:
        for line, raw in _raw_rows(path):
            form, content = _recognized(raw)
            yield line, form, content
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror or error}") from error


def _recognized(raw: Any) -> tuple[str, dict[str, Any] | BadRow]:
    try:
        return recognized(raw() if callable(raw) else raw)
    except BadRow as fault:
        return "", fault


def _raw_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a file with their line (JSON lines) or ordinal; a value or a function that reads it or raises BadRow."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        yield from _lines(path)
    elif name.endswith((".json", ".json.gz")):
        yield from _document_rows(path)
    else:
        raise DataError(path, f"the ending is not known; known are {_ENDINGS}")


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _opened(path) as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(
                    path, "the compressed file is cut short or damaged; copy it again", number + 1
                ) from error
            if not line:
                return
            number += 1
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, lambda text=text: _parsed(text)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRow("it is not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"it is not valid JSON ({error.msg})") from None
    except RecursionError:
        raise BadRow("it is not valid JSON (nested too deeply)") from None
    except ValueError:
        raise BadRow("it is not valid JSON (a number has too many digits)") from None


def _document_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with _opened(path) as file:
            text = file.read().removeprefix(b"\xef\xbb\xbf")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(path, "the compressed file is cut short or damaged; copy it again") from error
    if not text.strip():
        return
    try:
        document = _parsed(text)
    except BadRow as fault:
        # Many files of JSON lines are called .json.
        if text.lstrip().startswith(b"{") and text.strip().count(b"\n"):
            yield from _lines(path)
            return
        raise DataError(path, str(fault)) from None
    if is_task_file(document):
        try:
            yield from enumerate(task_rows(document), 1)
        except BadRow as fault:
            raise DataError(path, str(fault)) from None
    elif isinstance(document, list):
        yield from enumerate(document, 1)
    else:
        yield 1, document


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Opened here: pyarrow takes no name that is not UTF-8.
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in _table_rows(batch):
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(path, "is not a readable Parquet file; write it again", number + 1) from error


def _table_rows(batch: Any) -> list[Any]:
    try:
        rows: list[Any] = _without_nulls(batch.to_pylist())
    except UnicodeDecodeError:
        # Parquet does not check its strings; one by one, so that only the rows at fault are bad.
        return [partial(_decoded, batch.slice(index, 1)) for index in range(batch.num_rows)]
    return rows


def _decoded(row: Any) -> Any:
    try:
        return _without_nulls(row.to_pylist()[0])
    except UnicodeDecodeError:
        raise BadRow("it is not valid UTF-8") from None


def _without_nulls(value: Any) -> Any:
    """Objects in a table's column have the keys of all rows' objects; a null stands for a key that is absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
