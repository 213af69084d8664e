"""Tuning records: lines, whose they are, and what a compile makes of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from mxcompile import compiler, records, target
from mxcompile.compiler import Job
from mxcompile.errors import UsageError
from mxcompile.knobs import Choice, choose
from mxcompile.progress import Progress
from mxcompile.records import Case, Record, Records
from mxcompile.targets.cpu_matmul import Knobs

CASE = Case("int4", 640, 2048, 1, 2)
AHEAD = (("prefetch", 1024),)


def record(us: float = 10.0, knobs: tuple[tuple[str, int], ...] = (), case: Case = CASE) -> Record:
    return Record("cpu", "kernel", case, knobs, us)


def known(*found: Record) -> Records:
    return Records(found, "cpu", "kernel")


def test_a_line_reads_back() -> None:
    original = record(12.5, (("prefetch", 0), ("row_block", 4)))
    assert Record.parse(original.to_line()) == original


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"us": 1}', record().to_line().replace("10", "-1")]
)
def test_what_is_no_record_is_told(line: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting|not a tuning record|above 0"):
        Record.parse(line)


def test_the_least_time_counts() -> None:
    assert known(record(9), record(7), record(8)).times(CASE) == {(): 7}


@pytest.mark.parametrize(("hardware", "kernel"), [("other", "kernel"), ("cpu", "other")])
def test_another_machine_or_kernel_is_not_used(hardware: str, kernel: str) -> None:
    assert len(known(record())) == 1
    assert len(known(replace(record(), hardware=hardware, kernel=kernel))) == 0


def test_a_log_that_was_cut_off_loses_one_line(tmp_path: Path) -> None:
    records.append(tmp_path, [record(1), record(2)])
    path = tmp_path / records.FILE
    path.write_text(path.read_text()[:-5])
    records.append(tmp_path, [record(3)])
    assert records.read(path) == [record(1), record(3)]


def test_import_and_export_merge(tmp_path: Path) -> None:
    here, there, file = tmp_path / "a", tmp_path / "b", tmp_path / "moved.jsonl"
    records.append(here, [record(1), record(1), record(2)])
    records.append(there, [record(2)])
    assert records.export(here, file) == 2
    assert records.merge(file, there) == 1
    assert records.merge(file, there) == 0
    assert set(records.read(there / records.FILE)) == {record(1), record(2)}


def test_import_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello\n")
    for path in (tmp_path / "text", tmp_path / "missing"):
        with pytest.raises(UsageError):
            records.merge(path, tmp_path)


def test_the_kernels_have_a_version() -> None:
    assert len(records.kernel_version()) == 12


def test_a_named_device_gives_the_knobs_of_a_program_for_it(tmp_path: Path) -> None:
    kernel, where = records.kernel_version(), target.find("raspberry-pi-5")
    case = replace(CASE, threads=4)
    of_board = (Record("board", kernel, case, knobs, us) for knobs, us in (((), 9.0), (AHEAD, 5.0)))
    records.append(tmp_path, of_board)
    job = Job(Path("m.onnx"), where.name, ("4.2bit",), Path("m.mxc"), log=tmp_path)
    assert compiler._knobs(job, where, Progress()) == Choice()
    found = compiler._knobs(replace(job, hardware="board"), where, Progress())
    assert found.by_format == {"int4": Knobs(prefetch=1024)}
    with pytest.raises(UsageError, match=r"no records of 'nobody' .* some of 'board'"):
        compiler._knobs(replace(job, hardware="nobody"), where, Progress())


def test_nothing_known_means_defaults() -> None:
    assert choose(known(), 2) == Choice()
    assert Choice().knobs(640, 2048) == ()


def test_a_format_takes_what_is_best_over_its_shapes() -> None:
    wide = replace(CASE, rows=4096)
    found = choose(
        known(record(10), record(9, AHEAD), record(100, case=wide), record(99, AHEAD, wide)), 2
    )
    assert found.knobs(1, 1) == (("int4", Knobs(prefetch=1024)),)
    assert found.by_shape == {}
    assert choose(known(record(10), record(9, AHEAD)), 1) == Choice()  # other threads


def test_a_shape_gets_its_own_where_it_pays() -> None:
    wide = replace(CASE, rows=4096)
    found = choose(
        known(record(10), record(9, AHEAD), record(100, case=wide), record(130, AHEAD, wide)), 2
    )
    assert found.knobs(1, 1) == ()
    assert found.knobs(CASE.rows, CASE.columns) == (("int4", Knobs(prefetch=1024)),)


def test_decode_and_prefill_each_tune_their_own_knobs() -> None:
    many = replace(CASE, batch=128)
    block = (("row_block", 6),)
    found = choose(
        known(record(10), record(9, AHEAD), record(50, case=many), record(40, block, many)), 2
    )
    assert found.knobs(1, 1) == (("int4", Knobs(prefetch=1024, row_block=6)),)
