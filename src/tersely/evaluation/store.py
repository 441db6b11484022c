"""Where results are kept: one SQLite file for what is finished, and one beside it for what is not.

Finished runs are written with a rollback journal and a sync at each commit: they survive a kill and a power cut, and
a network folder will do. Unfinished work is written without syncs, since there is much of it: it survives a kill, and
what a power cut damages is seen by its checksum and measured again.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from tersely import __version__
from tersely.errors import DataError, OutputError, UsageError
from tersely.results import Blame, Evaluation, Speed
from tersely.results.plain import to_plain
from tersely.results.run import Figure, Kind, Result, Run, base_of, figures, kind_of

KEPT_DAYS = 30
"""Unfinished work that was not touched for so long is dropped."""
_BUSY_SECONDS = 30.0
_IDS = 2**63
_ESCAPED = "backslashreplace"
_MAGIC = b"SQLite format 3\0"
_RUNS, _UNFINISHED = 0x74727331, 0x74727532
"""Application ids, which tell a store from other databases."""
_KINDS: dict[str, type[Evaluation] | type[Blame] | type[Speed]] = {
    "evaluation": Evaluation,
    "blame": Blame,
    "speed": Speed,
}
# Statements that lead from each version to the next.
_RUNS_VERSIONS = (
    (
        "CREATE TABLE runs (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, created TEXT NOT NULL, "
        "model TEXT NOT NULL, fingerprint TEXT NOT NULL, base TEXT, base_fingerprint TEXT, tersely TEXT NOT NULL, "
        "result TEXT NOT NULL)",
        "CREATE INDEX runs_of_model ON runs (fingerprint)",
    ),
)
_UNFINISHED_VERSIONS = (
    (
        "CREATE TABLE works (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, touched REAL NOT NULL)",
        "CREATE TABLE parts (work INTEGER NOT NULL REFERENCES works ON DELETE CASCADE, name TEXT NOT NULL, "
        "checksum INTEGER NOT NULL, value BLOB NOT NULL, PRIMARY KEY (work, name))",
    ),
)
_COLUMNS = ("run", "created", "kind", "model", "base", "what", "value", "stderr", "low", "high", "unit", "items", "of")


def default_store() -> Path:
    """The user's own store, in the place that the system has for such data."""
    from platformdirs import user_data_path

    return user_data_path("tersely") / "runs.sqlite"


@final
class Store:
    """Finished runs, and the parts of unfinished ones. Several processes may use one file at once.

    path: made with its folder where there is none. Unfinished work lies beside it, in `NAME.unfinished.sqlite`.

    Raises OutputError: a place that cannot be read or written, or that another process holds; DataError: a file that
    is no store, is damaged, or was written by a newer tersely. Such files are left as they are.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = default_store() if path is None else Path(path).expanduser()
        self._runs = _Database(self.path, _RUNS, _RUNS_VERSIONS, durable=True)
        self._parts: _Database | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. What was added is on disk already."""
        self._runs.close()
        if self._parts is not None:
            self._parts.close()

    def add(self, result: Result) -> int:
        """Keep a result; gives the number of its run. ValueError: it holds a NaN."""
        base = base_of(result)
        row = (
            kind_of(result),
            result.setting.created,
            _writable(result.model.name),
            result.model.fingerprint,
            None if base is None else _writable(base.name),
            None if base is None else base.fingerprint,
            __version__,
            _writable(result.to_json()),
        )
        with self._runs.writing() as database:
            added = database.execute(
                "INSERT INTO runs (kind, created, model, fingerprint, base, base_fingerprint, tersely, result) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            assert added.lastrowid is not None
            return added.lastrowid

    def get(self, id: int) -> Run:
        """One run. Raises UsageError: there is no such run."""
        rows = self._runs.rows(f"{_SELECT} WHERE id = ?", (id,)) if abs(id) < _IDS else []
        if not rows:
            raise UsageError(self._no_run(id))
        return _run(rows[0])

    def runs(
        self,
        *,
        kind: Kind | None = None,
        fingerprint: str | None = None,
        name: str | None = None,
        limit: int | None = None,
    ) -> tuple[Run, ...]:
        """Runs, the latest added first. A run that this version cannot read is among them, without a result.

        fingerprint: of the model, or how it begins; name: a part of the model's name, in capitals or not.
        Raises UsageError: no such kind, or a limit below 1.
        """
        if kind is not None and kind not in _KINDS:
            raise UsageError(f"no runs of kind {kind!r}; there are {', '.join(_KINDS)}")
        if limit is not None and limit < 1:
            raise UsageError(f"limit={limit}: expected 1 or more")
        conditions = {
            "kind = :kind": kind,
            "substr(fingerprint, 1, length(:fingerprint)) = :fingerprint": fingerprint,
            "instr(lower(model), lower(:name)) > 0": name and _writable(name),
        }
        given = [text for text, value in conditions.items() if value is not None]
        where = f" WHERE {' AND '.join(given)}" if given else ""
        values = {
            "kind": kind,
            "fingerprint": fingerprint,
            "name": name and _writable(name),
            "limit": -1 if limit is None else min(limit, _IDS - 1),
        }
        rows = self._runs.rows(f"{_SELECT}{where} ORDER BY id DESC LIMIT :limit", values)
        return tuple(_run(row) for row in rows)

    def delete(self, id: int) -> None:
        """Remove a run; its number is not given again. Raises UsageError: there is no such run."""
        with self._runs.writing() as database:
            if abs(id) >= _IDS or not database.execute("DELETE FROM runs WHERE id = ?", (id,)).rowcount:
                raise UsageError(self._no_run(id))

    def unfinished(self, key: str) -> Unfinished:
        """What was kept of the work with this key: a mapping that is on disk at each change."""
        if self._parts is None:
            beside = self.path.with_suffix(f".unfinished{self.path.suffix}")
            self._parts = _Database(beside, _UNFINISHED, _UNFINISHED_VERSIONS, durable=False)
            self._drop_old(self._parts)
        return Unfinished(self._parts, key)

    def _drop_old(self, parts: _Database) -> None:
        before = time.time() - KEPT_DAYS * 86400
        if parts.rows("SELECT 1 FROM works WHERE touched < ? LIMIT 1", (before,)):
            with parts.writing() as database:
                database.execute("DELETE FROM works WHERE touched < ?", (before,))

    def _no_run(self, id: int) -> str:
        found = self._runs.rows("SELECT min(id), max(id), count(*) FROM runs")[0]
        return f"{self.path} has no run {id}; " + (
            f"it has {found[2]}, numbered {found[0]} to {found[1]}" if found[2] else "it is empty"
        )


@final
class Unfinished(MutableMapping[str, bytes]):
    """Named pieces of a piece of work, each on disk as soon as it is set; `Store.unfinished` gives one.

    A piece that was damaged on disk is as good as absent. Raises OutputError and DataError as the store does.
    """

    def __init__(self, database: _Database, key: str) -> None:
        self._database = database
        self._key = key

    def __getitem__(self, name: str) -> bytes:
        rows = self._database.rows(
            "SELECT checksum, value FROM parts JOIN works ON work = works.id WHERE key = ? AND name = ?",
            (self._key, name),
        )
        if not rows or zlib.crc32(rows[0][1]) != rows[0][0]:
            raise KeyError(name)
        value: bytes = rows[0][1]
        return value

    def __setitem__(self, name: str, value: bytes) -> None:
        now = time.time()
        with self._database.writing() as database:
            database.execute(
                "INSERT INTO works (key, touched) VALUES (?, ?) ON CONFLICT (key) "
                "DO UPDATE SET touched = excluded.touched WHERE excluded.touched > touched + 3600",
                (self._key, now),
            )
            database.execute(
                "INSERT OR REPLACE INTO parts SELECT id, ?, ?, ? FROM works WHERE key = ?",
                (name, zlib.crc32(value), value, self._key),
            )

    def __delitem__(self, name: str) -> None:
        with self._database.writing() as database:
            gone = database.execute(
                "DELETE FROM parts WHERE name = ? AND work = (SELECT id FROM works WHERE key = ?)", (name, self._key)
            )
            if not gone.rowcount:
                raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        rows = self._database.rows(
            "SELECT name, checksum, value FROM parts JOIN works ON work = works.id WHERE key = ? ORDER BY parts.rowid",
            (self._key,),
        )
        return iter([name for name, checksum, value in rows if zlib.crc32(value) == checksum])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Forget all of it, at once."""
        with self._database.writing() as database:
            database.execute("DELETE FROM works WHERE key = ?", (self._key,))


@final
class _Database:
    """A SQLite file of one application id, at the latest version of its tables; its errors as the user's."""

    def __init__(self, path: Path, application: int, versions: Sequence[Sequence[str]], *, durable: bool) -> None:
        self.path = path
        self._refuse_other(application)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the folder {path.parent}: {error.strerror}; choose another store"
            ) from error
        with self._telling():
            self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                self._connection.text_factory = lambda data: data.decode("utf-8", "replace")
                self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
                self._connection.execute("PRAGMA foreign_keys = ON")
                self._update(application, versions)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        self._connection.close()

    def rows(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._telling():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """All of what is done inside, or nothing."""
        with self._telling():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def _update(self, application: int, versions: Sequence[Sequence[str]]) -> None:
        if self._version(len(versions)) == len(versions):
            return
        # Space that unfinished work has used is given back. Can be chosen only before there are tables.
        self._connection.execute("PRAGMA auto_vacuum = FULL")
        with self.writing() as database:
            for statements in versions[self._version(len(versions)) :]:  # another process may have been faster
                for statement in statements:
                    database.execute(statement)
            database.execute(f"PRAGMA application_id = {application}")
            database.execute(f"PRAGMA user_version = {len(versions)}")

    def _version(self, known: int) -> int:
        version: int = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if not 0 <= version <= known:
            raise DataError(
                f"{self.path} was written by a newer tersely (version {version} of the store; this one knows {known}); "
                "update tersely, or choose another store"
            )
        return version

    def _refuse_other(self, application: int) -> None:
        """Before SQLite touches the file: it must be new, or a store."""
        try:
            with self.path.open("rb") as file:
                head = file.read(100)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read: {error.strerror}; choose another store") from error
        other = head[: len(_MAGIC)] != _MAGIC or int.from_bytes(head[68:72], "big") != application
        # Where a first commit was cut off, SQLite undoes it by the journal beside the file.
        if head and other and not self.path.with_name(self.path.name + "-journal").exists():
            raise DataError(f"{self.path} is not a store of tersely's; choose another path, or move that file away")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _as_users(error, self.path) from error


def _as_users(error: sqlite3.Error, path: Path) -> OutputError | DataError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return DataError(f"{path} is damaged ({error}); move it away, and a new one is made")
    causes = {
        sqlite3.SQLITE_BUSY: "another process holds it, or its folder has no locks; try again, or choose another",
        sqlite3.SQLITE_LOCKED: "another process holds it; try again",
        sqlite3.SQLITE_READONLY: "it is read-only; make it and its folder writable, or choose another store",
        sqlite3.SQLITE_CANTOPEN: "it cannot be opened or made; check its folder, or choose another store",
        sqlite3.SQLITE_FULL: "the disk is full; make room",
    }
    return OutputError(f"cannot use the store {path}: {causes.get(code, str(error))}")


_SELECT = "SELECT id, kind, created, model, fingerprint, base, base_fingerprint, tersely, result FROM runs"


def _writable(text: str) -> str:
    """The bytes of a path that are no UTF-8 as escapes, which JSON reads back as they were."""
    return text.encode(errors=_ESCAPED).decode()


def _run(row: tuple[Any, ...]) -> Run:
    number, word, created, model, fingerprint, base, base_fingerprint, writer, text = row
    kind = _KINDS.get(word)
    result: Result | None = None
    reason = ""
    try:
        if kind is None:
            raise DataError(f"unknown kind {word!r}")
        result = kind.from_json(text)
    except (DataError, AttributeError, IndexError, AssertionError, RecursionError) as error:
        reason = f"written by tersely {writer}, this is {__version__}: {error}"
    return Run(number, word, created, model, fingerprint, base, base_fingerprint, result, reason)


def export(runs: Iterable[Run], path: str | Path, *, overwrite: bool = False) -> Path:
    """Write runs to a file: `.json` has everything, `.csv` a line for each number, for a spreadsheet.

    The file appears when it is whole. In CSV, unknown and infinite numbers are empty, and a text that a spreadsheet
    would take for a formula has a ' before it.

    Raises UsageError: another suffix; OutputError: the file exists (without `overwrite`), or cannot be written.
    """
    target = Path(path).expanduser()
    forms = {".json": _json, ".csv": _csv}
    if target.suffix.lower() not in forms:
        raise UsageError(f"{target}: expected a name that ends in .json or .csv")
    if not overwrite and os.path.lexists(target):
        raise OutputError(f"{target} exists; choose another name, or allow it to be overwritten")
    data = forms[target.suffix.lower()](runs).encode(errors=_ESCAPED)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}; choose another place") from error
    return target


def _json(runs: Iterable[Run]) -> str:
    content = {"tersely": __version__, "runs": [to_plain(run) for run in runs]}
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _csv(runs: Iterable[Run]) -> str:
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(_COLUMNS)
    for run in runs:
        own = (str(run.id), *map(_cell, (run.created, run.kind, run.model, run.base or "")))
        if run.result is None:
            lines.writerow([*own, _cell(f"unreadable: {run.unreadable}"), *[""] * 7])
        else:
            lines.writerows([*own, *_cells(figure)] for figure in figures(run.result))
    return text.getvalue()


def _cells(figure: Figure) -> list[str]:
    numbers = (figure.value, figure.stderr, figure.low, figure.high)
    conditions = "; ".join(f"{name}: {value}" for name, value in figure.conditions.items())
    return [
        _cell(figure.name),
        *("" if n is None or not math.isfinite(n) else repr(n) for n in numbers),
        _cell(figure.unit),
        "" if figure.items is None else str(figure.items),
        _cell(conditions),
    ]


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text
