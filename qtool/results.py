"""What a job returns: a dict for programs, a table for pandas and for notebooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from typing import Any, Final

from qtool.errors import SetupError

_ROWS_SHOWN: Final = 20


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 pair, 1,680 pairs."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


class Result(ABC):
    """Base of every result of the public API."""

    @property
    @abstractmethod
    def headline(self) -> str:
        """The result in one sentence."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """One flat dict for each row of the result's table, all with the same keys."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The result as JSON objects, as `--json` prints it."""

    def to_frame(self) -> Any:
        """The rows as a `pandas.DataFrame`. Raises SetupError where pandas is not installed."""
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise SetupError("to_frame() needs pandas, which is not installed.", "pip install pandas") from error
        return pandas.DataFrame(self.records())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline}>"

    def _repr_html_(self) -> str:
        """The headline and the first rows, as a notebook shows them."""
        rows = self.records()
        table = _table(rows[:_ROWS_SHOWN]) if rows else ""
        hidden = len(rows) - _ROWS_SHOWN
        more = f"<p>{counted(hidden, 'more row')}: <code>to_frame()</code></p>" if hidden > 0 else ""
        return f"<p><b>{escape(self.headline)}</b></p>{table}{more}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row.values())}</tr>" for row in rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
