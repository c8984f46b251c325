"""`qtool score`: the scores that a runtime gives to each pair of a panel."""

from __future__ import annotations

import json
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
from qtool.progress import StageProgress, ignore
from qtool.results import Result, counted
from qtool.scoring.ledger import open_ledger
from qtool.scoring.remembering import Remembering
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.scorer import AnswerCounter, sigmoid
from qtool.storage.atomic import PARTIAL, atomic_write, refuse_existing

if TYPE_CHECKING:
    from qtool.scoring.scorer import Scorer


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
        panel = panel.shard(self.shard)
        if self.instruction is None:
            return panel
        changed = (replace(query, item=query.item.with_instruction(self.instruction)) for query in panel.queries)
        return replace(panel, queries=tuple(changed))


# Output files of runs that can be resumed. A file appears under its name when it is complete; until then its answers are
# in the ledger `NAME.partial`.


def check_output(output: Path, beginning: bytes, *, force: bool) -> None:
    """Raise UsageError where `output` exists; with `force` only where it does not begin with `beginning`, as ours do."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder; expected a file.", "Choose another --output.")
    refuse_existing(output, lambda file: _begins(file, beginning), "it holds something else", force=force)


def _begins(file: Path, beginning: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(beginning)) in (beginning, b"")
    except FileNotFoundError:  # a broken link
        return False
    except OSError as error:
        raise SetupError(f"{file} cannot be read: {error.strerror}.") from error


@contextmanager
def resumable(scorer: Scorer, output: Path | None, *, force: bool) -> Iterator[Scorer]:
    """`scorer` with the answers of an interrupted run for `output`; closed afterwards.

    The answers are deleted when the block, in which the output is written, ends well.
    """
    with closing(scorer):
        if output is None:
            yield scorer
            return
        partial = output.with_name(output.name + PARTIAL)
        with open_ledger(partial, scorer.identity, anew=force) as ledger:
            yield Remembering(scorer, [ledger])
            partial.unlink()


_BEGINNING: Final = b'{"query_id": '


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """What to score. With an `output`, an interrupted run is resumed; `force` replaces it and starts over."""

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
        """The pair as a line of the output."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True, repr=False)
class Scores(Result):
    """The scored pairs in the panel's order, the panel, and what the scores depend on."""

    pairs: tuple[ScoredPair, ...]
    panel: str
    panel_sha256: str
    identity: dict[str, Any]

    @property
    @override
    def headline(self) -> str:
        return f"{counted(len(self.pairs), 'scored pair')} of panel {self.panel}."

    @override
    def records(self) -> list[dict[str, Any]]:
        return [asdict(pair) for pair in self.pairs]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": 1, **asdict(self)}


def score(options: ScoreOptions, progress: StageProgress | None = None) -> Scores:
    """Score a panel. Raises UsageError for an embedder; with an `output`, answers before an error are kept for the next run."""
    if options.output is not None:
        check_output(options.output, _BEGINNING, force=options.force)
    panel = options.panel.load()
    scorer = open_runtime(options.target, options.runtime)
    if scorer.task is not Task.RERANK:
        raise UsageError(f"{options.target} is an embedder: it gives vectors, not scores.", "Use qtool embed.")
    pairs = panel.pairs
    counter = AnswerCounter("scoring", len(pairs), progress or ignore)
    with resumable(scorer, options.output, force=options.force) as remembering:
        answers = zip(pairs, remembering.score(pairs, counter), strict=True)
        scored = tuple(ScoredPair(p.query.id, p.document.id, value, sigmoid(value)) for p, value in answers)
        if options.output is not None:
            with atomic_write(options.output) as file:
                file.write("".join(f"{pair.line}\n" for pair in scored).encode())
    return Scores(scored, panel.name, panel.sha256, asdict(scorer.identity))
