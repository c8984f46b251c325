"""`python -m tests.engines`: serve every case with vLLM and write what was measured into docs/serving.md.

The table comes from what `make test-engines` tests, by the same code.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from tests.docs_pages import DOCS
from tests.engines.comparison import CASES, PANELS, Case, Row, opened

PAGE = DOCS / "serving.md"
BLOCK = re.compile(r"(<!-- measured by python -m tests\.engines -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = "\n| model | weights | questions | number | largest distance | seconds |\n| --- | --- | --- | ---: | ---: | ---: |\n"
UNITS = {"reranker": "log-odds", "embedder": "1 - cosine"}


def line(case: Case, row: Row) -> str:
    distance = f"{row.distance:.1e} {UNITS[case.model]}"
    return f"| {case.model} | {case.weights} | {row.questions} | {row.count} | {distance} | {row.seconds:.0f} |\n"


def measured() -> str:
    """The rows of all cases, each printed as soon as it is known."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            with opened(case, Path(folder)) as both:
                for questions in PANELS:
                    lines.append(line(case, both.row(questions)))
                    sys.stderr.write(lines[-1])
    return "".join(lines)


if __name__ == "__main__":
    table = HEAD + measured() + "\n"
    PAGE.write_text(BLOCK.sub(lambda found: found[1] + table + found[2], PAGE.read_text()))
