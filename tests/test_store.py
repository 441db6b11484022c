"""The store of runs: nothing that was added is lost, nothing else is touched, like is compared with like."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from tersely.errors import DataError, OutputError, UsageError
from tersely.evaluation import store as store_module
from tersely.evaluation.comparing import compare_runs
from tersely.evaluation.store import KEPT_DAYS, Store, default_store, export
from tersely.report.runs_tables import comparison_table, run_lines, runs_table
from tersely.results import (
    Bin,
    Blame,
    Calibration,
    Comparison,
    Depth,
    Divergence,
    Estimate,
    Evaluation,
    Part,
    Point,
    Reliability,
    Sample,
    Setting,
    Site,
    Speed,
    Subject,
    TaskResult,
    TextResult,
)
from tersely.results.run import Result, Run, figures, kind_of

SETTING = Setting("2026-01-02T03:04:05+00:00", "cpu", "A Processor", 2, 8 << 30, {"tersely": "1", "torch": "2"})
BASE = Subject("models/whole", "b" * 64, "float32", 1000, 4000)


def subject(name: str = "models/small", letter: str = "a") -> Subject:
    return Subject(name, letter * 64, "float32", 1000, 1000)


def near(value: float, stderr: float = 0.01) -> Estimate:
    return Estimate(value, stderr, value - 1.96 * stderr, value + 1.96 * stderr)


def unknown(value: float) -> Estimate:
    """Of a single document."""
    return Estimate(value, math.inf, -math.inf, math.inf)


def evaluation(
    model: Subject | None = None,
    *,
    base: Subject | None = BASE,
    loss: Estimate | None = None,
    kl: float = 0.03,
    score: float = 0.4,
    sha256: str = "1" * 64,
    items: str = "2" * 64,
) -> Evaluation:
    loss = loss or near(1.5)
    divergence = Divergence(
        "full", 4096, 100, 5, near(1.4), near(0.1), near(kl), {"0.5": 0.01, "1": 2.0}, near(0.9), near(0.8),
        near(0.02), near(0.01), {"1": 0.9, "2-5": 0.1}, 0.95,
    )  # fmt: skip
    bins = (Bin(0, 7, 60, near(2.0), near(1.9), near(0.05)), Bin(8, 15, 40, unknown(1.0), None, None))
    bits = near(loss.value / math.log(2) / 4)
    text = TextResult(
        "t.txt[-5:]", "documents", sha256, 5, 9, 100, 64, loss, math.exp(loss.value), bits, bins, (), divergence
    )
    sure = Calibration(near(0.5), near(0.1), (Reliability(10, 0.55, 0.4),))
    task = TaskResult(
        "arc", "ARC", "knowledge", "acc", True, 0.25, 50, 200, items, near(score), near(0.5), 6, 1,
        (Part("easy", 25, near(0.6), near(0.7)),), sure, sure, {"acc,none": score, "acc_stderr,none": math.inf}, 3.0,
    )  # fmt: skip
    compared = Comparison(
        "knowledge (arc)", "points", True, 50, "McNemar, exact", near(score), near(0.5), near(score - 0.5), 0.12, 0.24,
        math.inf, "no difference shown", "no difference shown on knowledge", "arc",
    )  # fmt: skip
    samples = (Sample("=Once", " upon", " in", 0.1, 0.2),)
    return Evaluation(
        model or subject(), base, SETTING, 0, text, (task,), "a verdict", (compared,), samples, ("a note",), None, 12.5
    )


def blame(model: Subject | None = None) -> Blame:
    sites = tuple(
        Site(f"model.layers.{n}", "block", n, "block", 300, 4.5 if n else None, near(0.01 * n, 0.001)) for n in range(3)
    )
    depth = (Depth("model.layers.0", 0, 0.1, 0.99),)
    return Blame(
        model or subject(), BASE, SETTING, "restore", "t.txt", "1" * 64, 5, 100, 64, near(0.03), sites, depth, (), 60.0
    )


def speed(model: Subject | None = None, *, hardware: str = "A Processor") -> Speed:
    points = (
        Point("prefill", 1, 128, 1, 0.1, 0.08, 0.2, 5, 1280.0),
        Point("decode", 4, 128, 32, 1.0, 0.9, 1.1, 5, 124.0),
    )
    where = replace(SETTING, hardware=hardware)
    return Speed(
        model or subject(), where, "transformers", "float32", points, 0.1, 2.0, 10**8, 2 * 10**8, 5000, ("too long",)
    )


RESULTS: tuple[Result, ...] = (evaluation(), evaluation(base=None, loss=unknown(1.5)), blame(), speed())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.sqlite") as opened:
        yield opened


def raw(path: Path, *statements: str) -> None:
    """Change a file as another program would."""
    connection = sqlite3.connect(path)
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def shown(what: RenderableType, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    console.print(what)
    console.file.close()
    return console.export_text()


CHILD = """
import os, resource, sys
from dataclasses import replace
from tersely.errors import OutputError
from tersely.evaluation.store import Store, export
from tersely.results import Speed
def attempt(work):
    try: work()
    except OutputError as error: print(error)
if sys.argv[2].isdecimal() and int(sys.argv[2]) > 1000: os.setuid(int(sys.argv[2]))
result = Speed.from_json(sys.argv[3])
store = Store(sys.argv[1])
"""


def child(script: str, path: Path, name: str = "") -> subprocess.Popen[str]:
    """A process of its own with `store` (at path) and a `result`; sys.argv[2] is the name."""
    arguments = [sys.executable, "-c", CHILD + script, str(path), name, speed().to_json()]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def told_by(script: str, path: Path, name: str = "") -> str:
    """What such a process prints; it must end well."""
    process = child(script, path, name)
    said = process.communicate()[0]
    assert process.returncode == 0
    return said


def test_every_kind_of_result_comes_back_as_it_was(tmp_path: Path) -> None:
    with Store(tmp_path / "new" / "folder" / "runs.sqlite") as store:
        numbers = [store.add(result) for result in RESULTS]
    with Store(tmp_path / "new" / "folder" / "runs.sqlite") as store:
        runs = store.runs()
        assert [run.id for run in runs] == sorted(numbers, reverse=True)
        for number, result in zip(numbers, RESULTS, strict=True):
            run = store.get(number)
            assert run in runs
            assert run.result == result
            assert run.result is not None
            assert run.result.setting == result.setting
            assert run.result.seconds == result.seconds
            assert (run.kind, run.created) == (kind_of(result), SETTING.created)
            assert (run.model, run.fingerprint) == (result.model.name, result.model.fingerprint)
            base = None if isinstance(result, Speed) else result.base
            assert (run.base, run.base_fingerprint) == ((base.name, base.fingerprint) if base else (None, None))


def test_a_result_with_a_nan_is_not_kept(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        store.add(evaluation(kl=math.nan))
    assert store.runs() == ()


def test_a_path_that_is_no_utf8_is_kept_and_exported(store: Store, tmp_path: Path) -> None:
    name = os.fsdecode(b"models/caf\xe9")
    result = evaluation(subject(name), base=subject(name))
    assert store.get(store.add(result)).result == result
    assert len(store.runs(name=name)) == 1
    written = json.loads(export(store.runs(), tmp_path / "all.json").read_text("utf-8"))
    assert written["runs"][0]["result"]["model"]["name"] == name
    assert "caf\\udce9" in export(store.runs(), tmp_path / "all.csv").read_text("utf-8")
    assert "caf" in shown(run_lines(store.runs()[0]))


def test_runs_are_chosen_by_kind_model_and_number(store: Store) -> None:
    first, second = subject("models/One", "c"), subject("models/two", "d")
    numbers = [store.add(evaluation(first)), store.add(speed(first)), store.add(evaluation(second))]

    def found(**chosen: Any) -> list[int]:
        return [run.id for run in store.runs(**chosen)]

    assert found() == numbers[::-1]
    assert found(limit=2) == [numbers[2], numbers[1]]
    assert found(kind="evaluation") == [numbers[2], numbers[0]]
    assert found(fingerprint=first.fingerprint) == [numbers[1], numbers[0]]
    assert found(fingerprint="ddd") == [numbers[2]]
    assert found(name="one", kind="speed") == [numbers[1]]
    assert found(name="%") == []
    with pytest.raises(UsageError, match="'speeds'; there are evaluation, blame, speed"):
        found(kind="speeds")
    with pytest.raises(UsageError, match="limit=0"):
        found(limit=0)


def test_a_deleted_run_is_gone_and_its_number_is_not_given_again(store: Store) -> None:
    numbers = [store.add(speed()) for _ in range(3)]
    store.delete(numbers[2])
    for attempt in (store.get, store.delete):
        with pytest.raises(UsageError, match=r"has no run 3; it has 2, numbered 1 to 2"):
            attempt(numbers[2])
        for wrong in (0, -1, 10**30):
            with pytest.raises(UsageError, match=f"has no run {wrong}"):
                attempt(wrong)
    assert store.add(speed()) == 4
    for number in (1, 2, 4):
        store.delete(number)
    with pytest.raises(UsageError, match="it is empty"):
        store.get(1)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ('UPDATE runs SET result = \'{"of": "the future"}\' WHERE id = 2', "has no of"),
        ("UPDATE runs SET result = 'rubbish' WHERE id = 2", "not the JSON"),
        ("UPDATE runs SET result = '[]' WHERE id = 2", "expected an object"),
        ("UPDATE runs SET result = json_set(result, '$.text', 7) WHERE id = 2", "expected an object"),
        ("UPDATE runs SET result = json_set(result, '$.tasks', 7) WHERE id = 2", ""),
        ("UPDATE runs SET result = json_set(result, '$.setting.versions', 7) WHERE id = 2", ""),
        ("UPDATE runs SET result = json_remove(result, '$.seed') WHERE id = 2", "seed"),
        ("UPDATE runs SET result = CAST(x'ff00fe' AS TEXT) WHERE id = 2", "not the JSON"),
        ("UPDATE runs SET kind = 'energy' WHERE id = 2", "unknown kind 'energy'"),
    ],
)
def test_a_run_that_cannot_be_read_does_not_hide_the_others(
    statement: str, reason: str, store: Store, tmp_path: Path
) -> None:
    for _ in range(3):
        store.add(evaluation())
    raw(store.path, statement)
    runs = store.runs()
    assert [run.id for run in runs] == [3, 2, 1]
    assert [run.result is None for run in runs] == [False, True, False]
    assert reason in runs[1].unreadable
    assert "unreadable" in shown(runs_table(runs), 400)
    assert "cannot be read" in shown(run_lines(runs[1]))
    for suffix in ("json", "csv"):
        assert export(runs, tmp_path / f"all.{suffix}").stat().st_size > 0
    with pytest.raises(DataError, match="run 2 cannot be read"):
        compare_runs(runs[0], runs[1])
    store.delete(2)


def test_a_killed_process_loses_nothing_that_it_had_added(tmp_path: Path) -> None:
    """It is killed while it writes, at a different moment each time; whatever it had reported as done is there."""
    path = tmp_path / "runs.sqlite"
    script = (
        "parts = store.unfinished('work'); n = 0\n"
        "while True:\n"
        "    parts[f'{sys.argv[2]} {n}'] = bytes([n % 256]) * 50_000; n += 1\n"
        "    print('part', n - 1, flush=True)\n"
        "    if n % 3 == 0: print('run', store.add(result), flush=True)\n"
    )
    told: dict[str, list[str]] = {"part": [], "run": []}
    for attempt, lines in enumerate((1, 4, 5, 8, 23)):
        process = child(script, path, str(attempt))
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        for line in said:
            if line.endswith("\n"):
                word, number = line.split()
                told[word].append(number if word == "run" else f"{attempt} {number}")
        with Store(path) as store:
            assert {int(number) for number in told["run"]} <= {run.id for run in store.runs()}
            assert all(run.result == speed() for run in store.runs())
            parts = store.unfinished("work")
            assert set(told["part"]) <= set(parts)
            for name, value in parts.items():
                assert value == bytes([int(name.split()[1]) % 256]) * 50_000
            assert store.add(speed()) > 0
            store.delete(store.runs()[0].id)
    assert told["run"]


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    count = 25
    script = (
        f"for n in range({count}):\n"
        "    store.unfinished('shared')[f'{sys.argv[2]} {n}'] = sys.argv[2].encode()\n"
        "    model = replace(result.model, name=sys.argv[2])\n"
        "    print(store.add(replace(result, model=model)))\n"
    )
    names = ("x", "y", "z")
    processes = [child(script, path, name) for name in names]
    numbers = [line for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0] * len(names)
    with Store(path) as store:
        assert sorted(run.id for run in store.runs()) == sorted(map(int, numbers))
        for name in names:
            assert len(store.runs(name=name)) == count
        assert dict(store.unfinished("shared")) == {f"{x} {n}": x.encode() for x in names for n in range(count)}


def test_unfinished_work_is_there_again_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    with Store(path) as store:
        work, other = store.unfinished("one"), store.unfinished("two")
        assert dict(work) == {}
        work["plan"] = b"1"
        work["part"] = b"\0" * 10
        work["part"] = b"\xff\0"
        work["empty"] = b""
        other["plan"] = b"2"
        del work["plan"]
        for attempt in (work.__getitem__, work.__delitem__):
            with pytest.raises(KeyError):
                attempt("plan")
    with Store(path) as store:
        work = store.unfinished("one")
        assert dict(work) == {"part": b"\xff\0", "empty": b""}
        assert len(work) == 2
        assert "part" in work
        work.clear()
        assert dict(work) == {}
        assert dict(store.unfinished("two")) == {"plan": b"2"}
        assert store.runs() == ()
        work["again"] = b"3"
        assert dict(work) == {"again": b"3"}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.binary(max_size=20)), max_size=12))
@settings(max_examples=30, deadline=None)
def test_unfinished_work_is_a_mapping_like_any_other(changes: list[tuple[str, bytes | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder, "runs.sqlite")) as store:
        work, plain = store.unfinished("key"), dict[str, bytes]()
        for name, value in changes:
            if value is None:
                assert work.pop(name, None) == plain.pop(name, None)
            else:
                work[name] = plain[name] = value
            assert dict(work) == plain
            assert len(work) == len(plain)


def test_old_unfinished_work_is_dropped_whole_and_new_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    with Store(path) as store:
        for key in ("old", "new"):
            store.unfinished(key).update({"a": b"1", "b": b"2"})
        number = store.add(speed())
    beside = tmp_path / "runs.unfinished.sqlite"
    age = f"touched - {KEPT_DAYS} * 86400"
    raw(beside, f"UPDATE works SET touched = {age} - 60 WHERE key = 'old'")
    raw(beside, f"UPDATE works SET touched = {age} + 3600 WHERE key = 'new'")
    with Store(path) as store:
        assert dict(store.unfinished("old")) == {}
        assert dict(store.unfinished("new")) == {"a": b"1", "b": b"2"}
        store.unfinished("new")["c"] = b"3"
        assert store.get(number).result == speed()
    raw(beside, f"UPDATE works SET touched = {age} + 3600 WHERE touched < {age} + 7200")
    with Store(path) as store:  # what was touched again is young
        assert len(store.unfinished("new")) == 3
    left = sqlite3.connect(beside)
    assert left.execute("SELECT count(*) FROM parts").fetchone() == (3,)
    left.close()


def test_a_damaged_piece_of_unfinished_work_is_as_good_as_absent(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.sqlite") as store:
        store.unfinished("key").update({"a": b"good", "b": b"good"})
    raw(tmp_path / "runs.unfinished.sqlite", "UPDATE parts SET value = x'00000000' WHERE name = 'b'")
    with Store(tmp_path / "runs.sqlite") as store:
        work = store.unfinished("key")
        assert dict(work) == {"a": b"good"}
        assert "b" not in work
        work["b"] = b"new"
        assert dict(work) == {"a": b"good", "b": b"new"}


def test_space_of_cleared_work_is_given_back(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.sqlite") as store:
        work = store.unfinished("key")
        work.update({str(n): bytes(100_000) for n in range(20)})
        file = tmp_path / "runs.unfinished.sqlite"
        assert file.stat().st_size > 2_000_000
        work.clear()
        assert file.stat().st_size < 100_000


def a_text(path: Path) -> None:
    path.write_text("This is my diary, not a store. " * 20)


def a_short_text(path: Path) -> None:
    path.write_text("x")


def another_database(path: Path) -> None:
    raw(path, "CREATE TABLE mine (a)", "INSERT INTO mine VALUES (1)")


def a_newer_store(path: Path) -> None:
    Store(path).close()
    raw(path, "PRAGMA user_version = 99")


def a_damaged_store(path: Path) -> None:
    with Store(path) as store:
        store.add(speed())
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\x55" * (len(data) - 100))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_text, "is not a store of tersely's"),
        (a_short_text, "is not a store of tersely's"),
        (another_database, "is not a store of tersely's"),
        (a_newer_store, r"newer tersely \(version 99 of the store; this one knows 1\)"),
        (a_damaged_store, "is damaged"),
    ],
)
def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(make: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    make(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=message), Store(path) as store:
        store.runs()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["runs.sqlite"]


def test_unfinished_work_does_not_go_into_another_file(tmp_path: Path) -> None:
    a_text(tmp_path / "runs.unfinished.sqlite")
    with Store(tmp_path / "runs.sqlite") as store, pytest.raises(DataError, match="is not a store"):
        store.unfinished("key")
    assert (tmp_path / "runs.unfinished.sqlite").read_text().startswith("This is my diary")


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    """A process that is killed before its first commit leaves one."""
    (tmp_path / "runs.sqlite").touch()
    with Store(tmp_path / "runs.sqlite") as store:
        assert store.get(store.add(speed())).result == speed()


def test_a_place_where_no_store_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(OutputError, match="cannot be read: Is a directory"):
        Store(tmp_path / "folder.sqlite")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot make the folder"):
        Store(tmp_path / "file" / "runs.sqlite")


def test_a_store_that_is_held_by_another_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_BUSY_SECONDS", 0.01)
    path = tmp_path / "runs.sqlite"
    with Store(path) as store:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        assert store.runs() == ()
        with pytest.raises(OutputError, match="another process holds it"):
            store.add(speed())
        holder.execute("ROLLBACK")
        holder.close()
        assert store.add(speed()) == 1


def test_a_full_disk_is_said_to_be_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    with Store(path) as store:
        store.add(speed())
        store.unfinished("key")["a"] = b"1"
    said = told_by(
        "work = store.unfinished('key')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "attempt(lambda: store.add(replace(result, notes=('x' * 200_000,))))\n"
        "attempt(lambda: work.update(b=bytes(200_000)))\n"
        "attempt(lambda: export(store.runs() * 100, sys.argv[1] + '.json'))\n",
        path,
    )
    assert said.count("cannot use the store") == 2
    assert said.count("cannot write") == 1
    with Store(path) as store:
        assert [run.result for run in store.runs()] == [speed()]
        assert dict(store.unfinished("key")) == {"a": b"1"}
        assert store.add(speed()) == 2
    assert not list(tmp_path.glob("*.json*"))


def test_a_read_only_store_is_read_and_not_written() -> None:
    folder = Path(tempfile.mkdtemp())  # not pytest's: what the user nobody cannot enter
    try:
        path = folder / "runs.sqlite"
        with Store(path) as store:
            store.add(speed())
            store.unfinished("key")["a"] = b"1"
        path.chmod(0o444)
        (folder / "runs.unfinished.sqlite").chmod(0o444)
        folder.chmod(0o555)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        said = told_by(
            "print(len(store.runs()))\n"
            "work = store.unfinished('key'); print(dict(work))\n"
            "attempt(lambda: store.add(result)); attempt(lambda: work.clear())\n"
            "attempt(lambda: Store(sys.argv[1] + '.new'))\n",
            path,
            "65534" if os.geteuid() == 0 else str(os.geteuid()),
        )
        assert said.startswith("1\n{'a': b'1'}\n")
        assert said.count("it is read-only") == 2
        assert said.count("it cannot be opened or made") == 1
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_the_users_own_store_lies_where_the_system_keeps_such_data() -> None:
    assert default_store().name == "runs.sqlite"
    assert default_store().parent.name == "tersely"
    assert default_store().is_absolute()


@pytest.fixture
def runs(store: Store) -> tuple[Run, ...]:
    for result in RESULTS:
        store.add(result)
    return store.runs()


def test_an_export_as_json_holds_everything(runs: tuple[Run, ...], tmp_path: Path) -> None:
    path = export(runs, tmp_path / "all.JSON")
    written = json.loads(path.read_text("utf-8"))["runs"]
    for plain, run in zip(written, runs, strict=True):
        kind = type(run.result)
        assert kind is not type(None)
        assert kind.from_json(json.dumps(plain.pop("result"))) == run.result  # type: ignore[union-attr]
        assert Run(**plain, result=run.result) == run


def test_an_export_as_csv_has_a_line_for_every_number(runs: tuple[Run, ...], tmp_path: Path) -> None:
    path = export(runs, tmp_path / "all.csv")
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    expected = [(run, figure) for run in runs if run.result for figure in figures(run.result)]
    assert len(expected) > 80
    for line, (run, figure) in zip(lines, expected, strict=True):
        assert (line["run"], line["model"], line["base"], line["kind"]) == (
            str(run.id), run.model, run.base or "", run.kind,
        )  # fmt: skip
        assert (line["what"], line["unit"]) == (figure.name, figure.unit)
        assert line["items"] == ("" if figure.items is None else str(figure.items))
        for column in ("value", "stderr", "low", "high"):
            number = getattr(figure, column)
            assert line[column] == "" if number is None or math.isinf(number) else float(line[column]) == number


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_finds_no_formula_in_an_export(name: str, store: Store, tmp_path: Path) -> None:
    store.add(evaluation(subject(name), base=subject(name)))
    with export(store.runs(), tmp_path / "all.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        assert line["model"] == line["base"] == f"'{name}"
        for column in line.keys() - {"value", "stderr", "low", "high"}:
            assert not line[column].startswith(("=", "+", "-", "@", "\t", "\r"))


def test_an_export_overwrites_only_what_it_may(runs: tuple[Run, ...], tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"all\.csv exists"):
        export(runs, path)
    assert path.read_text() == "mine"
    export(runs, path, overwrite=True)
    assert path.read_text().startswith("run,created,kind,model,base,what,value,stderr,low,high,unit,items,of\n")
    for wrong in ("all.xlsx", "all"):
        with pytest.raises(UsageError, match=r"ends in \.json or \.csv"):
            export(runs, tmp_path / wrong)
    with pytest.raises(OutputError, match="cannot write"):
        export(runs, tmp_path / "missing" / "all.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        export(runs, tmp_path / "folder.csv", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["all.csv", "folder.csv", "runs.sqlite"]


def as_run(result: Result, number: int = 1) -> Run:
    base = None if isinstance(result, Speed) else result.base
    return Run(
        number, kind_of(result), SETTING.created, result.model.name, result.model.fingerprint,
        base.name if base else None, base.fingerprint if base else None, result,
    )  # fmt: skip


def test_names_of_numbers_are_unique_in_a_run() -> None:
    for result in RESULTS:
        names = [figure.name for figure in figures(result)]
        assert len(set(names)) == len(names)


def test_every_number_of_a_run_is_like_itself() -> None:
    for result in RESULTS:
        compared = compare_runs(as_run(result), as_run(result, 2))
        assert {each.name for each in compared.contrasts} == {figure.name for figure in figures(result)}
        for each in compared.contrasts:
            assert each.remark == ""
            assert each.difference is not None
            assert each.difference.value == 0 or math.isinf(figures_of(result)[each.name])
        assert "both runs measured the same model" in compared.notes


def figures_of(result: Result) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures(result)}


def test_numbers_on_the_same_data_are_compared() -> None:
    first = as_run(evaluation(loss=near(1.5, 0.03), score=0.4))
    second = as_run(evaluation(subject("models/other", "c"), loss=near(1.6, 0.04), score=0.3), 2)
    found = {each.name: each for each in compare_runs(first, second).contrasts}
    loss = found["loss"].difference
    assert loss is not None
    assert loss.value == pytest.approx(0.1)
    assert loss.stderr == pytest.approx(0.05)
    assert loss.low == pytest.approx(0.1 - 1.96 * 0.05, abs=1e-4)
    assert loss.high == pytest.approx(0.1 + 1.96 * 0.05, abs=1e-4)
    assert found["arc"].difference is not None
    assert found["arc"].difference.value == pytest.approx(-0.1)
    assert found["perplexity"].difference is not None
    assert found["perplexity"].difference.low is None
    back = {each.name: each for each in compare_runs(second, first).contrasts}
    for name, each in found.items():
        opposite = back[name].difference
        assert (opposite is None) == (each.difference is None)
        if opposite is not None and each.difference is not None and math.isfinite(opposite.value):
            assert opposite.value == -each.difference.value


def test_numbers_on_other_data_are_shown_and_not_compared() -> None:
    first, second = as_run(evaluation()), as_run(evaluation(subject(letter="c"), sha256="9" * 64), 2)
    found = {each.name: each for each in compare_runs(first, second).contrasts}
    for name in ("loss", "KL", "bits per byte", "top-1 agreement"):
        assert found[name].difference is None
        assert found[name].first is not None
        assert found[name].second is not None
        assert found[name].remark.startswith("not comparable: other text")
    assert found["arc"].difference is not None
    first, second = as_run(evaluation()), as_run(evaluation(items="9" * 64), 2)
    found = {each.name: each for each in compare_runs(first, second).contrasts}
    assert found["arc"].remark == "not comparable: other items"
    assert found["arc/easy"].remark == "not comparable: other items"
    assert found["knowledge (arc), difference"].remark == "not comparable: other items"
    assert found["loss"].difference is not None


def test_what_is_measured_against_a_base_needs_the_same_base() -> None:
    first = as_run(evaluation())
    for base, remark in ((subject("other", "f"), "other base"), (replace(BASE, fingerprint=""), "base not known")):
        found = {each.name: each for each in compare_runs(first, as_run(evaluation(base=base), 2)).contrasts}
        assert found["KL"].remark == f"not comparable: {remark}"
        assert found["loss"].difference is not None
        assert found["arc"].difference is not None


def test_models_with_other_tokens_are_compared_in_bits_per_byte() -> None:
    first = evaluation()
    assert first.text is not None
    # The same bytes in half as many tokens of twice the loss.
    text = replace(first.text, tokens=50, loss=near(3.0))
    second = replace(first, text=text)
    found = {each.name: each for each in compare_runs(as_run(first), as_run(second, 2)).contrasts}
    assert found["loss"].remark == "not comparable: other tokens"
    assert found["bits per byte"].difference is not None
    found = {
        each.name: each
        for each in compare_runs(as_run(first), as_run(replace(first, text=replace(text, tokens=60)), 2)).contrasts
    }
    assert found["bits per byte"].remark == "not comparable: other bytes"


def test_speeds_of_other_hardware_are_not_compared_but_sizes_are() -> None:
    found = {each.name: each for each in compare_runs(as_run(speed()), as_run(speed(hardware="B"), 2)).contrasts}
    assert found["first token"].remark == "not comparable: other hardware"
    assert found["disk"].difference is not None
    assert found["disk"].difference.value == 0


def test_runs_of_two_kinds_are_not_compared() -> None:
    with pytest.raises(UsageError, match="run 1 is of the kind speed and run 2 of the kind blame"):
        compare_runs(as_run(speed()), as_run(blame(), 2))


def test_what_only_one_run_has_is_said_to_be() -> None:
    found = {e.name: e for e in compare_runs(as_run(evaluation()), as_run(evaluation(base=None), 2)).contrasts}
    assert found["KL"].remark.startswith("not comparable: base")
    alone = replace(evaluation(), tasks=())
    found = {e.name: e for e in compare_runs(as_run(evaluation()), as_run(alone, 2)).contrasts}
    assert found["arc"].remark == "only in run 1"
    found = {e.name: e for e in compare_runs(as_run(alone), as_run(evaluation(), 2)).contrasts}
    assert found["arc"].remark == "only in run 2"


def test_tables_show_the_numbers(runs: tuple[Run, ...]) -> None:
    listed = shown(runs_table(runs))
    for text in (
        "loss 1.5000, KL 0.0300",
        "most by model.layers.2 (0.0200)",
        "prefill 1,280 tokens/s, decode 124 tokens/s",
        "2026-01-02 03:04",
    ):
        assert text in listed
    lines = [shown(run_lines(run)) for run in runs]
    for run, text in zip(runs, lines, strict=True):
        assert run.model in text
        assert "A Processor (cpu), 2 threads, as float32" in text
        assert run.result is not None
        for figure in figures(run.result):
            assert figure.detail or figure.name in text
    assert "no difference shown on knowledge" in lines[-1]
    other = as_run(evaluation(subject("models/other", "c"), loss=near(1.7), items="9" * 64), 7)
    compared = shown(comparison_table(compare_runs(runs[-1], other)))
    assert "not comparable: other items" in compared
    assert "+0.2000 nats" in compared
    assert "run 7 worse" in compared


def test_names_from_elsewhere_do_nothing_to_a_terminal(store: Store) -> None:
    name = "[/bold][red]x\x1b[2J"
    store.add(evaluation(subject(name), base=subject(name)))
    run = store.runs()[0]
    for what in (runs_table([run]), run_lines(run), comparison_table(compare_runs(run, run))):
        text = shown(what)
        assert "[/bold][red]x" in text
        assert "\x1b" not in text
