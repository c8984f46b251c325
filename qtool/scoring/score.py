"""`qtool score`: what a runtime answers to each pair of a panel."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from qtool.arch.spec import Task
from qtool.errors import SetupError, UsageError
from qtool.inputs.builtin import load_panels
from qtool.inputs.panels import Panel, PanelShard
from qtool.options import Options
from qtool.progress import StageProgress
from qtool.results import Result
from qtool.scoring.ledger import open_ledger
from qtool.scoring.remembering import Remembering
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.scorer import sigmoid
from qtool.storage.output import named_write_errors

if TYPE_CHECKING:
    from qtool.scoring.scorer import Scorer

# Which part of which panel is asked, under which instruction. Ids and order stay the panel's own.


@dataclass(frozen=True)
class PanelChoice(Options):
    """A panel by name or path: its first `limit` queries, of these one shard; `instruction` replaces the queries' own."""

    source: str
    limit: int | None = None
    shard: PanelShard | None = None
    instruction: str | None = None

    def load(self) -> Panel:
        """Read and check it."""
        (panel,) = load_panels([self.source], self.limit)
        return _instructed(panel.shard(self.shard), self.instruction)


def _instructed(panel: Panel, instruction: str | None) -> Panel:
    if instruction is None:
        return panel
    changed = (replace(query, item=query.item.with_instruction(instruction)) for query in panel.queries)
    return replace(panel, queries=tuple(changed))


# Files of answers that a killed run leaves to be gone on with. A file appears under its name when it is complete;
# until then its answers stand in the ledger `NAME.partial`.


_PARTIAL: Final = ".partial"
_NEW: Final = ".new"


def check_output(output: Path, beginning: bytes, *, force: bool) -> None:
    """Raise UsageError where it exists, and with `force` where it does not begin as what is to be written there does."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder.", "Name a file.")
    if not force and (output.exists() or output.is_symlink()):
        raise UsageError(f"{output} exists.", "Choose another --output, or pass --force to replace it.")
    if output.exists() and not _begins(output, beginning):
        raise UsageError(f"{output} was not written by this command.", "Choose another --output.")


def _begins(file: Path, beginning: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(beginning)) in (beginning, b"")
    except OSError as error:
        raise SetupError(f"{file} cannot be read: {error.strerror}.") from error


@contextmanager
def resumable(scorer: Scorer, output: Path | None, *, force: bool) -> Iterator[Scorer]:
    """`scorer`, remembering what an interrupted run for `output` was answered; closed afterwards.

    What it has answered is forgotten when the block, in which the output is written, ends well.
    """
    with closing(scorer):
        if output is None:
            yield scorer
            return
        partial = output.with_name(output.name + _PARTIAL)
        with open_ledger(partial, scorer.identity, anew=force) as ledger:
            yield Remembering(scorer, ledger)
            partial.unlink()


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Yield a path to write; the file takes `output`'s place when the block ends well."""
    written = output.with_name(output.name + _NEW)
    try:
        with named_write_errors(output):
            yield written
            with written.open("rb") as file:
                os.fsync(file.fileno())
            written.replace(output)
    finally:
        written.unlink(missing_ok=True)


# `qtool score`: what a runtime answers to each pair of a panel. One line a pair, in the panel's order, whatever order
# the answers came in.


_BEGINNING: Final = b'{"query_id": '


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """Whom to ask what. With an `output`, an interrupted run is gone on with; `force` replaces it and begins anew."""

    target: str
    panel: PanelChoice
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    output: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class ScoredPair:
    """A pair's log-odds before the sigmoid, and after it the probability of "yes"."""

    query_id: str
    document_id: str
    log_odds: float
    probability: float

    @property
    def line(self) -> str:
        """As it stands in the output."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True, repr=False)
class Scores(Result):
    """The scored pairs in the panel's order, and who was asked what."""

    pairs: tuple[ScoredPair, ...]
    panel: str
    panel_sha256: str
    identity: dict[str, Any]

    @property
    @override
    def headline(self) -> str:
        return f"{len(self.pairs):,} scored pairs of panel {self.panel}."

    @override
    def records(self) -> list[dict[str, Any]]:
        return [asdict(pair) for pair in self.pairs]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": 1, **asdict(self)}


def score(options: ScoreOptions, progress: StageProgress | None = None) -> Scores:
    """Score a panel. Raises UsageError for an embedder; what was answered before any error is kept for the next run."""
    if options.output is not None:
        check_output(options.output, _BEGINNING, force=options.force)
    panel = options.panel.load()
    scorer = open_runtime(options.target, options.runtime)
    if scorer.task is not Task.RERANK:
        raise UsageError(f"{options.target} is an embedder: it gives vectors and no scores.", "Use qtool embed.")
    pairs, shown = panel.pairs, Counter("scoring", len(panel.pairs), progress)
    with resumable(scorer, options.output, force=options.force) as asked:
        answers = zip(pairs, asked.score(pairs, shown), strict=True)
        scored = tuple(ScoredPair(p.query.id, p.document.id, value, sigmoid(value)) for p, value in answers)
        if options.output is not None:
            with replacing(options.output) as file:
                file.write_text("".join(f"{pair.line}\n" for pair in scored))
    return Scores(scored, panel.name, panel.sha256, asdict(scorer.identity))


class Counter:
    """Counts answers for whoever shows progress."""

    def __init__(self, stage: str, total: int, progress: StageProgress | None) -> None:
        self._stage = stage
        self._total = total
        self._progress = progress
        self._done = 0
        self._show()

    def __call__(self, _place: int, _answer: object) -> None:
        """One more is known."""
        self._done += 1
        self._show()

    def _show(self) -> None:
        if self._progress is not None:
            self._progress(self._stage, self._done, self._total)
