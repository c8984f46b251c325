"""What is verified: two models, their task, the panels, the gates, and the folder of the results."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from qtool.arch.detect import Detection
from qtool.arch.spec import Task
from qtool.artefact import Artefact, CheckpointArtefact, GgufArtefact, fetch_large_files, open_artefact
from qtool.checks.findings import Finding, finding
from qtool.checks.reference import Reference, open_reference
from qtool.checks.stage import REDERIVE, WEIGHTS
from qtool.errors import ModelError, SetupError, UsageError
from qtool.extras import require_extra
from qtool.inputs.builtin import default_panels, demo_panels_among, load_panels
from qtool.inputs.media import MediaAccess
from qtool.inputs.panels import Panel, PanelShard
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.options import Memory, Options
from qtool.recipe import LoadedRecipe, load_recipe, parse_recipe
from qtool.resources import DEFAULT_RECIPE
from qtool.scoring.cache import AnswersInMemory
from qtool.scoring.ledger import AnswerStore, may_be_ledger
from qtool.scoring.runtime import RuntimeOptions, texts_only
from qtool.scoring.scorer import Identity
from qtool.storage.atomic import named_write_errors
from qtool.storage.location import is_on_this_disk
from qtool.verify.gates import check_names
from qtool.verify.report import Report

# The folder of a verification: the answers as they come, then the reports. A folder without a report.json is resumed; one
# with it is replaced only with `force`. Nothing is removed before everything that can be refused was checked:
# `check_output` first, `prepare_folder` last. Other programs write files of the same names, so their content is checked.


REPORT: Final = "report.json"
REPORTS: Final = (REPORT, "report.md", "report.html", "junit.xml")
ANSWERS: Final = "answers"


class Role(str, Enum):
    """A model that is asked: the reference, the reference in bf16 or the artefact; also the name of its ledger."""

    REFERENCE = "reference"
    REFERENCE_BF16 = "reference-bf16"
    ARTEFACT = "artefact"


LEDGERS: Final = tuple(f"{role.value}.jsonl" for role in Role)
_OLD_LEDGER: Final = "noise.jsonl"
"""The ledger of the reference in bf16, as it was called with report schema 2."""


def answer_file(folder: Path, role: Role) -> Path:
    """The ledger of a role in the folder of a verification; one of an older qtool keeps its name."""
    new, old = (folder / ANSWERS / name for name in (f"{role.value}.jsonl", _OLD_LEDGER))
    return old if role is Role.REFERENCE_BF16 and old.exists() and not new.exists() else new


def check_output(folder: Path, *, force: bool) -> None:
    """Raise UsageError on a folder that is finished or somebody else's, SetupError on one that cannot be written."""
    with named_write_errors(folder):
        if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
            raise UsageError(f"{folder} exists and was not written by qtool verify.", "Choose another output folder.")
        if (folder / REPORT).exists() and not force:
            raise UsageError(f"{folder} holds a finished verification.", "Pass --force to replace it.")
        _check_writable(folder)


def prepare_folder(folder: Path, *, force: bool) -> None:
    """Make `folder` ready for a run, new or resumed; `force` starts over. Raises what `check_output` raises."""
    check_output(folder, force=force)
    with named_write_errors(folder):
        ledgers = _ledgers(folder) if force else []
        for ledger in ledgers:
            _check_idle(ledger)
        # All reports at once, so that a killed run leaves no older verdict beside its answers. Only files that qtool
        # wrote: the folder may hold others.
        for path in (*(folder / name for name in REPORTS), *ledgers):
            path.unlink(missing_ok=True)
        (folder / ANSWERS).mkdir(parents=True, exist_ok=True)


def _is_ours(folder: Path) -> bool:
    if (folder / REPORT).exists():
        return _is_report(folder / REPORT)
    if not (folder / ANSWERS).is_dir():
        return not any(folder.iterdir())
    ledgers = _ledgers(folder)
    has_reports = any((folder / name).exists() for name in REPORTS)
    return all(map(may_be_ledger, ledgers)) and (bool(ledgers) or not has_reports)


def _ledgers(folder: Path) -> list[Path]:
    return [path for path in (folder / ANSWERS / name for name in (*LEDGERS, _OLD_LEDGER)) if path.exists()]


def _is_report(path: Path) -> bool:
    try:
        content = read_json(path)
    except ModelError:
        return False
    return bool(content.keys() >= {"artefact", "reference", "verdict"})


def _check_writable(folder: Path) -> None:
    """Raise SetupError where `mkdir` would fail, before any model is fetched."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise SetupError(f"{folder} cannot be written: {existing} is not a folder.", "Choose another output folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SetupError(f"{folder} cannot be written: no permission for {existing}.", "Choose another output folder.")


def _check_idle(ledger: Path) -> None:
    """Raise UsageError where another run is writing `ledger`: it would go on in a file that has been removed."""
    with ledger.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another run is writing {ledger}.", "Wait for it, or choose another output.") from None


# The case: everything that can be refused is refused here, before a weight is read or a server is sent a question.


_URL: Final = ("http://", "https://")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """What to compare, on what.

    `artefact` is a folder, a GGUF file, a repository on the hub or the URL of a running server. `panels` are files
    or built-in names, by default those that the model and its runtime can read; `limit` takes the first queries of
    each, `shard` a share of those. `recipe` overrides the artefact's own. The reference answers `noise_queries` of
    each panel in bf16, too. `revision` and `reference_revision` are of repositories on the hub. With `output` every
    answer is kept in that folder as it comes, and an interrupted run is resumed; `force` replaces a finished one
    and starts over. `data` is what calibrated weights were fitted to, for `rederive`. `engine` to `timeout` are for a
    server: see RuntimeOptions. What a panel may name
    is in `allow_outside_files` and `allow_local_addresses`: see PanelChoice.
    """

    artefact: str
    reference: str
    panels: tuple[str, ...] = ()
    allow_outside_files: bool = False
    allow_local_addresses: bool = False
    task: Task | None = None
    recipe: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    memory: Memory = "auto"
    limit: int | None = None
    shard: PanelShard | None = None
    mmproj: Path | None = None
    revision: str | None = None
    reference_revision: str | None = None
    token: str | None = field(default=None, repr=False)
    engine: str | None = None
    served_model: str | None = None
    concurrency: int = 8
    timeout: float = 300.0
    structure_only: bool = False
    weights: bool = False
    rederive: bool = False
    data: tuple[str, ...] = ()
    keep_going: bool = False
    noise_queries: int = 20
    use_cache: bool = True
    output: Path | None = None
    force: bool = False

    @property
    def reads_headers_only(self) -> bool:
        """Whether no stage needs weights: of repositories on the hub only headers and small files are fetched."""
        return self.structure_only and not (self.weights or self.rederive)

    @property
    def access(self) -> MediaAccess:
        """What the panels may name."""
        return MediaAccess(self.allow_outside_files, self.allow_local_addresses)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the verdict is about; `query_instruction` is the publisher's, for an embedder's queries without one of the panel.

    `undecided` names the panels that prove nothing about this model: coloured shapes, where it is no demo model.
    """

    options: VerifyOptions
    task: Task
    task_source: str
    query_instruction: str | None
    recipe: LoadedRecipe
    panels: tuple[Panel, ...]
    artefact_revision: str | None = None
    reference_revision: str | None = None
    shared: SharedReference | None = None
    undecided: tuple[str, ...] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the shards of one verification must have in common, and which of them this is."""
        options = self.options
        return {
            "artefact": options.artefact,
            "reference": options.reference,
            "task": self.task.value,
            "panels": [panel.sha256 for panel in self.panels],
            "limit": options.limit,
            "dtype": options.dtype,
            "noise_queries": options.noise_queries,
            "query_instruction": self.query_instruction,
            "panel_sources": list(options.panels),
            "undecided_panels": list(self.undecided),
            "recipe_text": self.recipe.text,
            "shard": str(options.shard) if options.shard else None,
        }


@dataclass(frozen=True, kw_only=True)
class LocatedCase(Case):
    """A case whose models are opened, once; `artefact` is None for a server, which shows no files.

    `left_out` says which of the built-in panels the artefact's runtime cannot read, and why. `mismatch` are the findings
    on an artefact that declares another family or task than the reference.
    """

    reference: Reference
    artefact: Artefact | None
    left_out: str = ""
    mismatch: tuple[Finding, ...] = ()


class SharedReference:
    """What the verifications of several artefacts against one reference have in common: it is opened and scored once."""

    def __init__(self) -> None:
        self.reference: Reference | None = None
        self._answers: dict[str, AnswerStore] = {}

    def answers(self, identity: Identity) -> AnswerStore:
        """What the reference of that identity has answered so far."""
        return self._answers.setdefault(identity.key, AnswersInMemory())

    def is_of(self, report: Report, options: VerifyOptions) -> bool:
        """Whether a finished report is what verifying by `options` would give."""
        case = open_case(options, self)
        stages = {stage.name for stage in report.stages}
        wanted = {WEIGHTS} if options.weights else set()
        wanted |= {REDERIVE} if options.rederive else set()
        same = json.loads(json.dumps(case.settings)) == json.loads(json.dumps(dict(report.settings)))
        return same and report.artefact.revision == case.artefact_revision and wanted <= stages


def open_case(options: VerifyOptions, shared: SharedReference | None = None) -> LocatedCase:
    """Open the models, read what they declare, check recipe and panels."""
    _check_revisions(options)
    if options.data and not options.rederive:
        raise UsageError(
            "--data is what calibrated weights are made again with; it applies to --rederive only.",
            "Add --rederive, or leave out --data. Pairs to score on are named by --panel.",
        )
    if not options.structure_only:
        require_extra("score", "Scoring the reference", "pass --structure-only (and --weights, --rederive)")
    reference = _reference(options, shared)
    artefact = _artefact(options)
    if artefact is not None and options.reads_headers_only:
        fetch_large_files(artefact, reference)
    declared = reference.detection
    if isinstance(artefact, GgufArtefact) and not options.structure_only:
        require_extra("llamacpp", "Scoring a GGUF file", "pass --structure-only (and --weights, --rederive)")
    task, task_source = _task(declared, artefact)
    mismatch = tuple(_mismatches(options.artefact, declared, artefact))
    reference = replace(reference, asked_task=task)  # it, or the artefact, may declare none
    artefact = None if artefact is None else replace(artefact, asked_task=task)
    recipe = _recipe(options, artefact)
    check_names(recipe.recipe.gates)
    left_out = ""
    if not options.panels:
        chosen, left_out = _default_panels(options, reference, artefact, task)
        options = replace(options, panels=chosen)
    panels = () if options.structure_only else tuple(_panels(options, declared))
    instruction = declared.family.embedder.query_instruction or None
    return LocatedCase(
        options=options,
        task=task,
        task_source=task_source,
        query_instruction=instruction,
        recipe=recipe,
        panels=panels,
        undecided=() if reference.is_demo else demo_panels_among(panels),
        reference=reference,
        artefact=artefact,
        artefact_revision=artefact.revision if artefact else None,
        shared=shared,
        reference_revision=reference.revision,
        left_out=left_out,
        mismatch=mismatch,
    )


def checkpoint_runtime(options: VerifyOptions, task: Task, dtype: str) -> RuntimeOptions:
    """How to open a checkpoint, the reference or an artefact."""
    return RuntimeOptions(task=task, dtype=dtype, device=options.device, memory=options.memory)


def artefact_runtime(options: VerifyOptions, artefact: Artefact | None, task: Task, family: str) -> RuntimeOptions:
    """How to open the artefact, or the server of `options` for None."""
    if artefact is None:
        return RuntimeOptions(
            task=task,
            engine=options.engine,
            served_model=options.served_model,
            concurrency=options.concurrency,
            timeout=options.timeout,
            family=family,
        )
    if isinstance(artefact, GgufArtefact):  # the file fixes the number format
        return RuntimeOptions(task=task, mmproj=options.mmproj)
    return replace(checkpoint_runtime(options, task, options.dtype), mmproj=options.mmproj)


def _reference(options: VerifyOptions, shared: SharedReference | None) -> Reference:
    """The reference, opened, or as another verification has opened it."""
    if shared is not None and shared.reference is not None:
        return shared.reference
    reference = open_reference(
        options.reference,
        options.task,
        options.reference_revision,
        options.token,
        headers_only=options.reads_headers_only,
    )
    if shared is not None:
        _ = reference.checkpoint, reference.detection  # what is wrong with it is wrong for all
        shared.reference = reference
    return reference


def is_server(target: str) -> bool:
    """Whether a target is the address of a server."""
    return target.startswith(_URL)


def _check_revisions(options: VerifyOptions) -> None:
    """Raise UsageError for a revision of what has none: --revision is easily taken for the reference's."""
    named = {
        "--revision": ("artefact", options.artefact, options.revision),
        "--reference-revision": ("reference", options.reference, options.reference_revision),
    }
    for option, (side, target, revision) in named.items():
        if revision is not None and (is_server(target) or is_on_this_disk(target)):
            raise UsageError(
                f"{option} names the {side}'s revision, and {target} is not a Hub repository.",
                "--revision is for the artefact, --reference-revision for the reference.",
            )


def _artefact(options: VerifyOptions) -> Artefact | None:
    if is_server(options.artefact):
        if options.structure_only:
            raise UsageError(
                f"--structure-only cannot check {options.artefact}: a server shows no files.",
                "Leave out --structure-only.",
            )
        return None
    return open_artefact(
        options.artefact,
        task=options.task,
        mmproj=options.mmproj,
        revision=options.revision,
        token=options.token,
        headers_only=options.reads_headers_only,
    )


def _task(reference: Detection, artefact: Artefact | None) -> tuple[Task, str]:
    """The task of the reference, else of the artefact, and what declares it."""
    if reference.task is None and isinstance(artefact, CheckpointArtefact):
        return artefact.detection.require_task(), artefact.detection.task_source
    return reference.require_task(), reference.task_source


def _mismatches(target: str, reference: Detection, artefact: Artefact | None) -> Iterator[Finding]:
    """What a checkpoint declares otherwise than the reference: a verdict about both, not an error of the command."""
    if not isinstance(artefact, CheckpointArtefact):
        return
    found = artefact.detection
    if reference.architecture.family != found.architecture.family:
        names = {"found": found.architecture.name, "expected": reference.architecture.name}
        yield finding("other-architecture", target, **names)
    if None not in (reference.task, found.task) and reference.task is not found.task:
        yield finding(
            "other-task",
            target,
            found=f"{found.require_task().value} ({found.task_source})",
            expected=f"{reference.require_task().value} ({reference.task_source})",
        )


def _recipe(options: VerifyOptions, artefact: Artefact | None) -> LoadedRecipe:
    """The recipe that --recipe names, else the one in the artefact's manifest, else the default.

    The default's gates hold for an artefact without a recipe: what may be lost does not depend on how it was lost.
    """
    if options.recipe is not None:
        return load_recipe(options.recipe)
    manifest = artefact.path / MANIFEST if isinstance(artefact, CheckpointArtefact) else None
    if manifest is None or not manifest.is_file():
        return load_recipe(DEFAULT_RECIPE)
    facts = read_json(manifest)
    if facts.get("kind") not in (None, "quantize"):
        return load_recipe(DEFAULT_RECIPE)
    recipe = facts.get("recipe")
    text = recipe.get("text") if isinstance(recipe, dict) else None
    if not isinstance(text, str):
        raise ModelError(f"{manifest} does not hold the recipe's text.", "Name a recipe with --recipe.")
    return parse_recipe(text, f"the recipe in {manifest}")


def _default_panels(
    options: VerifyOptions, reference: Reference, artefact: Artefact | None, task: Task
) -> tuple[tuple[str, ...], str]:
    """The built-in panels that both sides can read, and which others were left out and why."""
    architecture, is_demo = reference.detection.architecture, reference.is_demo
    panels = default_panels(is_vision=architecture.is_vision, is_demo=is_demo)
    texts = default_panels(is_vision=False, is_demo=is_demo)
    if options.structure_only or panels == texts:
        return panels, ""
    why = ""
    with suppress(ModelError):  # a broken file: the structure stage reports it
        runtime = artefact_runtime(options, artefact, task, architecture.family)
        why = texts_only(artefact or options.artefact, runtime)
    left_out = ", ".join(panel for panel in panels if panel not in texts)
    return (texts, f"{left_out} left out: {why}") if why else (panels, "")


def _panels(options: VerifyOptions, reference: Detection) -> list[Panel]:
    panels = [panel.shard(options.shard) for panel in load_panels(options.panels, options.limit, options.access)]
    if not reference.architecture.is_vision:
        for panel in panels:
            _refuse_pictures(panel, reference)
    return panels


def _refuse_pictures(panel: Panel, reference: Detection) -> None:
    for pair in panel.pairs:
        for item in (pair.query, pair.document):
            if item.image or item.video:
                raise UsageError(
                    f"Panel {panel.name}, query {pair.query.id!r}: item {item.id!r} holds a picture; "
                    f"{reference.architecture.name} reads text only.",
                    "Choose a text panel for this model.",
                )
