"""`rung forecast`, `rung classify`, `rung regress`. The client is a fake; nothing listens."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from rung import ClassifyTask, ForecastTask, Policy, Predictions, RegressTask
from rung.cli import ExitCode, main
from rung.cli._session import Connection
from rung.cli._tables import format_numbers
from rung.cli.views import sparkline
from rung.errors import UnknownModelError
from rung.types import Priority, QuantileForecast, Served
from tests.fakes.client import FakeClient

SERVED = Served("", "timesfm", "workstation", "timesfm-2.5")
POLICY = Policy(priority=Priority.USER)
SALES = "day,sales,visitors\nmon,1,10\ntue,2,20\nwed,3,30\n"
FORECAST = Predictions(
    forecasts=((4.0, 5.5),),
    quantiles=(
        QuantileForecast(level=0.1, forecasts=((3.0, 4.0),)),
        QuantileForecast(level=0.9, forecasts=((5.0, 7.0),)),
    ),
    served=SERVED,
    job_id="job-1",
)


class Rung:
    """Runs the command as a shell would, in a folder of its own."""

    def __init__(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        self.client = FakeClient()
        self.client.predictions = FORECAST
        self.folder = folder
        self.out = ""
        self.err = ""
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str, stdin: str = "") -> int:
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = main(arguments, opening=self._open)
        self.out, self.err = self._capsys.readouterr()
        return code

    def _open(self, connection: Connection) -> FakeClient:
        return self.client


@pytest.fixture
def rung(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rung:
    for name in ("RUNG_ADDRESS", "RUNG_TOKEN", "RUNG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    return Rung(capsys, monkeypatch, tmp_path)


def test_a_column_is_continued(rung: Rung) -> None:
    (rung.folder / "sales.csv").write_text(SALES)
    assert rung("forecast", "sales.csv", "--column", "sales", "--horizon", "2") == ExitCode.OK

    assert [line.split() for line in rung.out.splitlines()] == [
        ["step", "sales", "range"],
        ["4", "4.000", "3.000", "…", "5.000"],
        ["5", "5.500", "4.000", "…", "7.000"],
    ]
    assert rung.err.splitlines() == ["sales  ▁▃▄▆█", "timesfm on workstation · job job-1"]
    task = ForecastTask(series=((1.0, 2.0, 3.0),), horizon=2)
    assert rung.client.asked == [("predict", (task, "", POLICY))]


def test_json_has_everything(rung: Rung) -> None:
    arguments = ("forecast", "-n", "2", "-m", "timesfm", "--local-only", "--json")
    assert rung(*arguments, stdin="7\n8\n9\n") == ExitCode.OK

    found = json.loads(rung.out)
    assert found["columns"] == [
        {
            "column": "1",
            "forecast": [4.0, 5.5],
            "quantiles": [{"level": 0.1, "values": [3.0, 4.0]}, {"level": 0.9, "values": [5.0, 7.0]}],
        }
    ]
    assert (found["served"]["target"], found["job_id"], rung.err) == ("timesfm", "job-1", "")
    policy = Policy(local_only=True, priority=Priority.USER)
    task = ForecastTask(series=((7.0, 8.0, 9.0),), horizon=2)
    assert rung.client.asked == [("predict", (task, "timesfm", policy))]


def test_several_columns_stand_side_by_side(rung: Rung) -> None:
    rung.client.predictions = Predictions(forecasts=((4.0,), (40.0,)), served=SERVED, job_id="job-1")
    assert rung("forecast", "-n", "1", "-c", "visitors", "-c", "sales", stdin=SALES) == ExitCode.OK
    assert rung.out.split() == ["step", "visitors", "sales", "4", "4", "40"]
    ((_, (task, _, _)),) = rung.client.asked
    assert task.series == ((10.0, 20.0, 30.0), (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("arguments", "stdin", "why"),
    [
        ((), SALES, "several columns have numbers; say which with --column: sales, visitors"),
        (("-c", "sale"), SALES, "there is no column 'sale'; there are day, sales, visitors"),
        (("-c", "day"), SALES, "line 2 has 'mon' in the column day; it must be a number"),
        (("-c", "b"), "a,b\n1,2\n2,\n", "line 3 has nothing in the column b; it must be a number"),
        (("-c", "b"), "a,b\n1,2\n2,nan\n", "line 3 has 'nan' in the column b"),
        (("-c", "a"), "a,a\n1,2\n", "2 columns have the name 'a'"),
        ((), "day\nmon\n", "no column has numbers only"),
        ((), "", "the file is empty"),
        ((), "day,sales\n", "there are no rows under the names day, sales"),
        ((), "a,b\n1,2\n3\n", "line 3 has 1 columns, and line 1 has 2"),
        ((), 'a\n"1\n', "is no CSV"),
        (("-n", "0"), "1\n", "should be greater than or equal to 1"),
        (("nowhere.csv",), "", "nowhere.csv cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_forecast_is_said_before_anybody_is_asked(
    rung: Rung, arguments: tuple[str, ...], stdin: str, why: str
) -> None:
    assert rung("forecast", *arguments, stdin=stdin) == ExitCode.USAGE
    assert why in " ".join(rung.err.replace("│", " ").split())
    assert rung.client.asked == []


def test_a_failure_is_one_line_and_a_hint(rung: Rung) -> None:
    rung.client.error = UnknownModelError("no deployment can do prediction")
    assert rung("forecast", stdin="1\n2\n") == ExitCode.NOT_FOUND
    assert rung.err.splitlines()[0] == "error: no deployment can do prediction"


def test_classes_that_are_missing_are_filled_in(rung: Rung) -> None:
    rung.client.predictions = Predictions(labels=("a", "b"), served=SERVED, job_id="job-1")
    table = "\ufeffx;kind;y\n1;a;2\n3;;4\n\n5;b;6\n7; ;8\n"
    assert rung("classify", "-c", "kind", stdin=table) == ExitCode.OK

    assert rung.out == "x;kind;y\n1;a;2\n3;a;4\n5;b;6\n7;b;8\n"
    assert rung.err == "timesfm on workstation · job job-1\n"
    task = ClassifyTask(context=((1.0, 2.0), (5.0, 6.0)), labels=("a", "b"), rows=((3.0, 4.0), (7.0, 8.0)))
    assert rung.client.asked == [("predict", (task, "", POLICY))]


def test_numbers_that_are_missing_are_filled_in_or_told_with_their_lines(rung: Rung) -> None:
    rung.client.predictions = Predictions(values=(2.5,), served=SERVED, job_id="job-1")
    table = "name,size,rent\nup,1,1\ndown,2,\nleft,3,4\n"
    assert rung("regress", "-c", "rent", "-f", "size", stdin=table) == ExitCode.OK
    assert rung.out == "name,size,rent\nup,1,1\ndown,2,2.500\nleft,3,4\n"
    assert rung("regress", "-c", "rent", "-f", "size", "--json", stdin=table) == ExitCode.OK
    assert json.loads(rung.out)["rows"] == [{"line": 3, "value": 2.5}]
    task = RegressTask(context=((1.0,), (3.0,)), targets=(1.0, 4.0), rows=((2.0,),))
    assert [asked for asked, *_ in (each[1] for each in rung.client.asked)] == [task, task]


@pytest.mark.parametrize(
    ("arguments", "stdin", "why"),
    [
        (("-c", "x"), "x,y\n1,2\n", "no row lacks its x; leave those empty that are to be predicted"),
        (("-c", "x"), "x,y\n,2\n", "no row has its x"),
        (("-c", "x"), "x\n1\n", "it is the only column"),
        (("-c", "x", "-f", "x"), "x,y\n1,2\n", "x is what is predicted"),
        (("-c", "x"), "x,y,z\n1,2,q\n,3,r\n", "the column z has something else than numbers; --feature y"),
        (("-c", "x"), "x,y\n1,2\n,\n1,3\n,4\n5,\n", "line 6 has nothing in the column y"),
    ],
)
def test_what_cannot_be_filled_in_is_said(
    rung: Rung, arguments: tuple[str, ...], stdin: str, why: str
) -> None:
    for command in ("classify", "regress"):
        assert rung(command, *arguments, stdin=stdin) == ExitCode.USAGE
        assert why in " ".join(rung.err.replace("│", " ").split())
    assert rung.client.asked == []


def test_a_curve_and_its_continuation_have_one_scale() -> None:
    assert sparkline([0.0, 1.0], [7.0]) == ("▁▂", "█")
    assert sparkline([3.0, 3.0], [3.0]) == ("▁▁", "▁")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1204.7, 3.0], ["1205", "3"]),
        ([12.0437], ["12.04"]),
        ([0.12037, 0.5], ["0.1204", "0.5000"]),
        ([3.0, -4.0], ["3", "-4"]),
        ([0.0], ["0"]),
    ],
)
def test_numbers_have_the_decimals_that_their_size_deserves(values: list[float], wanted: list[str]) -> None:
    assert format_numbers(values) == wanted
