"""The tables of ``inpaint-kernels models``: every learned model, its paper, and whose weights it loads."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from inpaint_kernels.models.checkpoints import LAYOUTS, OURS, PAPERS


def tables() -> Iterator[Table]:
    """One table for each model: its dialects, the repositories whose weights they load, and the licence of these."""
    for model, paper in PAPERS.items():
        table = Table(title=f"{model.__name__}: {paper}", title_justify="left", title_style="bold", show_edge=False)
        for column in ("dialect", "weights of, on github.com", "licence of the weights"):
            table.add_column(column)
        rows = {
            (layout.dialect or "", layout.repository, layout.licence)
            for layout in LAYOUTS
            if layout.model is model and layout.repository != OURS
        }
        for row in sorted(rows) or [("", "none published", "")]:
            table.add_row(*row)
        yield table
