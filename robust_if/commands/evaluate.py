"""The commands ``evaluate`` and ``compare``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from robust_if.commands import options
from robust_if.commands.options import Json, Overwrite, err, out
from robust_if.evaluations.suites import comparing, engine
from robust_if.evaluations.suites.suite import Suite, suites
from robust_if.evaluations.suites.summary import ordered
from robust_if.sweep import Engine

#: What is printed for a verdict of a comparison.
_MARKS = {"worse": "[bold red]worse[/]", "changed": "[yellow]changed[/]", "better": "[green]better[/]", "unclear": "unclear"}


def evaluate(
    suite: Annotated[str | None, typer.Argument(metavar="SUITE", help="Name of a shipped suite, see --list, or your own TOML file.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for rows, results and report; runs/SUITE by default.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Rows at a time, each in a process with one thread; one per core by default. 0 is this process alone.")
    ] = None,
    by: Annotated[Engine, typer.Option("--engine", help="Processes of this machine, or Ray.")] = "local",
    seeds: Annotated[str | None, typer.Option(help="In place of the suite's own, such as 0,1,2 or 0-9.")] = None,
    row: Annotated[str | None, typer.Option("--row", help="Repeat this one row, and compare it with what --out holds of it.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Show the shipped suites and leave.")] = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Run every attack against every defence on every data set of a suite, with several seeds, and judge all by the same metrics.

    The same command goes on where an earlier one stopped: finished rows are kept, rows whose settings changed or that failed are worked out. The exit
    code is 1 if a row failed.
    """
    with options.errors():
        if listing:
            _list(as_json)
            return
        if suite is None:
            raise ValueError("suite: expected the name of a shipped suite, see --list, or a TOML file")
        chosen = None if seeds is None else _seeds(seeds)
        found = Suite.read(suite, chosen)
        directory = out_dir or Path("runs") / Path(suite).stem
        options.logs(as_json, (), logging.INFO)
        if row is not None:
            _repeat(found, row, directory, as_json)
            return
        command = ["robust-if", "evaluate", suite, *([] if seeds is None else ["--seeds", seeds])]
        with _progress() as watch:
            result = engine.run(found, directory, engine=by, workers=workers, overwrite=overwrite, command=command, watch=watch)
        if as_json:
            typer.echo(json.dumps(result))
        else:
            for table in tables(result, max(2, (out.width - 45) // 17)):
                out.print(table)
            options.note(result["warnings"])
            for name in ("results.parquet", "result.json", "report.html"):
                if (directory / name).is_file():
                    out.print(str(directory / name), soft_wrap=True, markup=False)
        if failed := [each for each in result["rows"] if each["error"] is not None]:
            err.print(f"[bold red]{len(failed)} of {len(result['rows'])} rows failed[/]; the same command tries them again", soft_wrap=True)
            raise typer.Exit(1)


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of `robust-if evaluate`.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="The same of the run that may be better or worse.")],
    tolerance: Annotated[float, typer.Option(help="Differences of a metric up to this one do not count.")] = 0.0,
    fail: Annotated[bool, typer.Option("--fail", help="Exit code 1 if anything became worse beyond noise, or fails now.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is better or worse in the second of two evaluations, by more than the noise over seeds."""
    with options.errors():
        found = comparing.compare(first, second, tolerance=tolerance)
        if as_json:
            typer.echo(json.dumps(found.plain()))
        else:
            _show(found)
        if fail and found.regressed:
            raise typer.Exit(1)


def tables(result: Mapping[str, Any], columns: int = 4) -> Iterator[Table]:
    """For every data set and attack: mean and 95 % interval over seeds, a line per defence, for the ``columns`` metrics that say most."""
    groups: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["data"], row["attack"]), {}).setdefault(row["defence"], []).append(row)
    for (data, attack), defences in groups.items():
        metrics = ordered(name for each in defences.values() for row in each for name in row["metrics"])
        shown = metrics[:columns]
        table = Table(title=escape(f"{data}, {attack}"), title_justify="left", caption_justify="left")
        more = f"; {len(metrics) - columns} more metrics in the files" if len(metrics) > columns else ""
        table.caption = f"mean ± half of the 95 % interval over seeds; seconds of the defence alone{more}"
        table.add_column("defence", overflow="fold")
        for name in [*shown, "seconds", "seeds"]:
            table.add_column(escape(name.replace("_", " ")), justify="right")
        for defence, each in defences.items():
            fine = [row for row in each if row["error"] is None]
            failed = f" ({len(each) - len(fine)} failed)" if len(fine) < len(each) else ""
            cells = [_mean([row["metrics"].get(name) for row in fine]) for name in shown]
            table.add_row(escape(defence), *cells, _mean([row["seconds"] for row in fine], 1), f"{len(fine)}{failed}")
        yield table


def _mean(values: list[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean, low, _ = comparing.interval(known)
    return f"{mean:.{digits}f}" + (f" ± {mean - low:.{digits}f}" if len(known) > 1 else "")


def _seeds(text: str) -> list[int]:
    """0,1,2 or 0-9, or both."""
    found: list[int] = []
    for part in options.names(text):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f"seeds: expected whole numbers and ranges, such as 0,1,2 or 0-9, got {text!r}")
        found += range(int(first), int(last or first) + 1)
    return found


def _list(as_json: bool) -> None:
    found = [Suite.read(name) for name in suites()]
    if as_json:
        typer.echo(json.dumps([{"name": each.name, "title": each.title, "about": each.about, "rows": len(each.rows())} for each in found]))
        return
    table = Table()
    for heading in ("suite", "rows", "what it shows"):
        table.add_column(heading, justify="right" if heading == "rows" else "left")
    for each in found:
        table.add_row(each.name, f"{len(each.rows()):,}", escape(each.title))
    out.print(table)


def _repeat(suite: Suite, wanted: str, directory: Path, as_json: bool) -> None:
    row, record, stored = engine.repeat(suite, wanted, directory)
    known = None if stored is None else stored.metrics
    if as_json:
        typer.echo(json.dumps({"row": row.said(), **asdict(record), "stored": known}))
    else:
        table = Table(title=escape(f"{row.said()} [{row.id}]"), title_justify="left")
        for heading in ("metric", "now", "stored"):
            table.add_column(heading, justify="left" if heading == "metric" else "right")
        for name in dict.fromkeys([*record.metrics, *(known or {})]):
            now, before = (None if metrics is None else metrics.get(name) for metrics in (record.metrics, known))
            table.add_row(escape(name), *("–" if value is None else repr(value) for value in (now, before)))
        out.print(table)
        if stored is not None and record.error is None:
            out.print("the same as stored" if known == record.metrics else "not the same as stored", soft_wrap=True)
    if record.error is not None:
        err.print(escape(record.traceback or ""))
        err.print(f"[bold red]failed:[/] {escape(record.error)}", soft_wrap=True)
        raise typer.Exit(1)


def _show(found: comparing.Comparison) -> None:
    order = list(_MARKS)
    moved = sorted((each for each in found.differences if each.verdict != "same"), key=lambda each: order.index(each.verdict))
    if moved:
        table = Table(title="RUN_B against RUN_A", title_justify="left", caption_justify="left")
        table.caption = "with 95 % intervals; of those called better or worse 5 % may be noise; *: other seeds"
        for heading in ("data / attack / defence", "metric", "before", "after", "difference", ""):
            table.add_column(heading, justify="right" if heading in ("before", "after", "difference") else "left", overflow="fold")
        for each in moved:
            ends = "" if each.low is None else f" [{each.low:+.3f}, {each.high:+.3f}]"
            numbers = (f"{each.before:.3f}", f"{each.after:.3f}", f"{each.difference:+.3f}{ends}" + ("" if each.paired else "*"))
            table.add_row(escape(f"{each.data} / {each.attack} / {each.defence}"), escape(each.metric), *numbers, _MARKS[each.verdict])
        out.print(table)
    same = len(found.differences) - len(moved)
    out.print(f"{same} of {len(found.differences)} metrics are the same on every seed", soft_wrap=True)
    for name, keys in (("RUN_A", found.only_first), ("RUN_B", found.only_second)):
        for key in keys:
            out.print(f"only in {name}: {' / '.join(key)}", soft_wrap=True, markup=False)
    for row in found.failed:
        err.print(f"[bold red]fails now:[/] {escape(row)}", soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Callable[[engine.Standing], None]]:
    """A bar with the time left where somebody looks at it, else a line per row, on standard error."""
    if not err.is_terminal:
        yield _line
        return
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None)

        def watch(standing: engine.Standing) -> None:
            _failure(standing)
            bar.update(task, completed=standing.done, total=standing.total, description=_left(standing.left))

        yield watch


def _line(standing: engine.Standing) -> None:
    _failure(standing)
    if standing.row is not None:
        row, record = standing.row
        err.print(
            f"{standing.done}/{standing.total} {escape(row.said())}: {record.spent:.1f} s{_left(standing.left)}", soft_wrap=True, highlight=False
        )


def _failure(standing: engine.Standing) -> None:
    if standing.row is not None and standing.row[1].error is not None:
        row, record = standing.row
        err.print(f"[bold red]failed:[/] {escape(row.said())} {escape(f'[{row.id}]')}: {escape(str(record.error))}", soft_wrap=True, highlight=False)


def _left(seconds: float | None) -> str:
    if seconds is None or seconds < 0.5:
        return ""
    size, unit = next((size, unit) for size, unit in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 1.5 * size or size == 1)
    return f", about {seconds / size:.{1 if size == 3600 else 0}f} {unit} left"
