"""Progress: timed always, shown where somebody looks."""

import pytest

from mxcompile import progress
from mxcompile.progress import LoggedProgress, Progress, TerminalProgress


def work(shown: Progress) -> None:
    with shown.stage("outer"):
        with shown.stage("inner", total=4) as advance:
            advance()
            advance(3)
        shown.note("half way")
    with shown.stage("outer"):
        pass


def test_times_each_stage_once_by_name() -> None:
    shown = Progress()
    work(shown)
    assert list(shown.seconds) == ["outer", "inner"]
    assert shown.seconds["outer"] >= shown.seconds["inner"] > 0


def test_a_failing_stage_is_timed_and_not_called_done() -> None:
    lines: list[str] = []
    shown = LoggedProgress(lines.append)
    with pytest.raises(KeyError), shown.stage("broken"):
        raise KeyError
    assert (lines, list(shown.seconds)) == ([], ["broken"])


def test_lines_for_logs() -> None:
    lines: list[str] = []
    work(LoggedProgress(lines.append))
    assert lines == ["inner: 0.0 s", "half way", "outer: 0.0 s", "outer: 0.0 s"]


def test_bars_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    work(TerminalProgress())
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("outer", "inner", "100%", "ETA", "half way"):
        assert part in err


@pytest.mark.parametrize(
    ("quiet", "verbose", "terminal", "kind"),
    [
        (False, False, True, TerminalProgress),
        (False, True, False, LoggedProgress),
        (False, False, False, Progress),
        (True, False, True, Progress),
    ],
)
def test_who_sees_what(
    monkeypatch: pytest.MonkeyPatch, quiet: bool, verbose: bool, terminal: bool, kind: type
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert type(progress.create(quiet=quiet, verbose=verbose, say=print)) is kind
