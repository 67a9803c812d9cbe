# SPDX-License-Identifier: Apache-2.0
"""Tables and numbers for people, as the planner's reports print them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

WIDEST = 10_000  # columns of a table


def wide_console(out: TextIO) -> Console:
  """As wide as its tables: a mesh that is cut at column 80 cannot be copied. A bracket in a
  name is no markup."""
  return Console(file=out, highlight=False, markup=False, width=WIDEST)


def print_table(
  console: Console,
  title: str,
  columns: Sequence[str],
  rows: Iterable[Sequence[str]],
  left: int = 1,
) -> None:
  """A table and an empty line; all columns but the first `left` are aligned right."""
  table = Table(title=title, title_justify="left", box=None, pad_edge=False)
  for number, column in enumerate(columns):
    table.add_column(column, justify="left" if number < left else "right", overflow="fold")
  for row in rows:
    table.add_row(*row)
  console.print(table, "")


def named_axis(axis: str, slow: Sequence[str]) -> str:
  return f"{axis} (data-centre network)" if axis in slow else axis


def known(value: float | None, form: str) -> str:
  """A value in a form such as `{:,.0f}`, or a question mark if it is not known."""
  return "?" if value is None else form.format(value)


def size(number: int | None) -> str:
  """Bytes for people, in powers of 1024."""
  if number is None:
    return "?"
  units = ("B", "KiB", "MiB", "GiB", "TiB")
  power = min(len(units) - 1, int(math.log(max(number, 1), 1024)))
  return f"{number / 1024**power:,.{0 if power == 0 else 2}f} {units[power]}"


def duration(seconds: float | None) -> str:
  if seconds is None:
    return "?"
  if seconds < 1e-3:
    return f"{seconds * 1e6:,.0f} us"
  return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


Rows = Iterator[tuple[str, ...]]


FITS = {True: "yes", False: "no", None: "?"}
