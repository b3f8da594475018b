"""What the commands say: consoles, bars, and errors as sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Tables keep a sensible width where the output is no terminal.
out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, soft_wrap=True, highlight=False)


class BarReporter:
    """Moves a progress bar; called as (share done, stage)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=1.0)

    def __call__(self, fraction: float, stage: str) -> None:
        """Show how far the work is."""
        self._progress.update(self._task, completed=fraction, description=escape(stage))


@contextmanager
def progress_bar() -> Iterator[BarReporter]:
    """A bar on standard error that goes away when the work is done; nothing where that is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield BarReporter(progress)


@contextmanager
def files_bar(total: int) -> Iterator[Callable[[], None]]:
    """A bar of files with the time that is left; what it yields moves it by one."""
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("photos", total=total)
        yield lambda: progress.advance(task)


@contextmanager
def steps_bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar of training steps with the time that is left; what it yields is told the number made and what to show."""
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, text: progress.update(task, completed=done, description=escape(text))


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """What the library says of bad input is said to the user as it is, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        fail(sentence(error))


def warn(text: str | None) -> None:
    """Say it on standard error, if there is something to say."""
    if text:
        err.print(f"[yellow]warning:[/yellow] {escape(text)}")


def fail(text: str) -> NoReturn:
    """Say why the work cannot be done, and end with exit code 1."""
    err.print(f"[red]error:[/red] {escape(text)}")
    raise typer.Exit(1)


def sentence(error: BaseException) -> str:
    """What is said of an error."""
    return str(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)
