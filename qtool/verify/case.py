"""What is verified: two models, their task, the panels, the gates, and the folder of the results."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qtool.arch.detect import Detection, detect
from qtool.arch.prompts import embedder_prompt
from qtool.arch.spec import Task
from qtool.errors import ModelError, SetupError, UsageError
from qtool.extras import require_extra
from qtool.inputs.builtin import default_panels, load_panels
from qtool.inputs.panels import Panel, PanelShard
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.recipe import LoadedRecipe, load_recipe, parse_recipe
from qtool.scoring.ledger import may_be_ledger
from qtool.scoring.runtime import RuntimeOptions, gguf_file, texts_only
from qtool.storage.hub import resolve
from qtool.storage.output import named_write_errors
from qtool.verify.gates import check_names

# The folder of a verification: every answer as it comes, then the reports. A folder without a finished report is one
# to go on with; a finished one is replaced only when told to, and nothing is removed before all that can be refused
# was: `check_output` first, `prepare` last. Others write files of the same names, so what is replaced or removed is
# looked into.


REPORT: Final = "report.json"
REPORTS: Final = (REPORT, "report.md", "report.html", "junit.xml")
ANSWERS: Final = "answers"
LEDGERS: Final = ("reference.jsonl", "noise.jsonl", "artefact.jsonl")


def check_output(folder: Path, *, force: bool) -> None:
    """Raise UsageError on a folder that is finished or somebody else's, SetupError on one that cannot be written."""
    with named_write_errors(folder):
        if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
            raise UsageError(f"{folder} exists and is no verification's.", "Name a new folder.")
        if (folder / REPORT).exists() and not force:
            raise UsageError(f"{folder} holds a finished verification.", "Pass --force to replace it.")
        _check_writable(folder)


def prepare_folder(folder: Path, *, force: bool) -> None:
    """Make `folder` ready for a run, new or continued; `force` begins anew. Raises what `check_output` raises."""
    check_output(folder, force=force)
    with named_write_errors(folder):
        ledgers = [folder / ANSWERS / name for name in LEDGERS] if force else []
        for ledger in ledgers:
            _check_idle(ledger)
        # All reports at once, for a run that dies must not leave an older one's verdict beside its answers. Only files
        # that qtool wrote: the folder may hold others.
        for path in (*(folder / name for name in REPORTS), *ledgers):
            path.unlink(missing_ok=True)
        (folder / ANSWERS).mkdir(parents=True, exist_ok=True)


def _is_ours(folder: Path) -> bool:
    if (folder / REPORT).exists():
        return _is_report(folder / REPORT)
    if not (folder / ANSWERS).is_dir():
        return not any(folder.iterdir())
    ledgers = [path for path in (folder / ANSWERS / name for name in LEDGERS) if path.exists()]
    has_reports = any((folder / name).exists() for name in REPORTS)
    return all(map(may_be_ledger, ledgers)) and (bool(ledgers) or not has_reports)


def _is_report(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= {"artefact", "reference", "verdict"}


def _check_writable(folder: Path) -> None:
    """What `mkdir` would find out too late: after the models were fetched."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise SetupError(f"{folder} cannot be written: {there} is no folder.", "Choose another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SetupError(f"{folder} cannot be written: {there} does not permit it.", "Choose another place.")


def _check_idle(ledger: Path) -> None:
    """Raise UsageError where a run is writing `ledger`: it would go on in a file that nobody finds."""
    if not ledger.exists():
        return
    with ledger.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another run is writing {ledger}.", "Wait for it, or choose another output.") from None


# What is verified: two models, their task, the panels, the gates. Whatever can be refused is refused here, before a
# weight is read or a server asked.


DEFAULT_RECIPE: Final = "nvfp4-w4a16"
"""Whose gates hold where an artefact brings no recipe: what may be lost does not depend on how it was lost."""

_URL: Final = ("http://", "https://")


@dataclass(frozen=True)
class VerifyOptions:
    """What to compare on what.

    `artefact` is a folder, a GGUF file, a repository on the hub or the URL of a running server; `panels` are files or
    built-in names, by default those that the model and its runtime can read; `limit` takes the first queries of each and `shard` a share of those; `recipe` overrides
    the artefact's own; `noise_queries` of each panel are also asked of the reference in bf16. With `output` every answer
    is kept in that folder as it comes, and an interrupted run goes on from there. `engine` to `timeout` are for a server: see RuntimeOptions.
    """

    artefact: str
    reference: str
    panels: tuple[str, ...] = ()
    task: Task | None = None
    recipe: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    limit: int | None = None
    shard: PanelShard | None = None
    mmproj: Path | None = None
    revision: str | None = None
    token: str | None = None
    engine: str | None = None
    served_model: str | None = None
    concurrency: int = 8
    timeout: float = 300.0
    structure_only: bool = False
    weights: bool = False
    rederive: bool = False
    keep_going: bool = False
    noise_queries: int = 20
    use_cache: bool = True
    output: Path | None = None


@dataclass(frozen=True)
class Case:
    """A verification that may begin; `artefact` is None of a server, which shows no files.

    An embedder's queries get `query_instruction`, the publisher's, where the panel gives none. `left_out` says which of
    the built-in panels the artefact's runtime cannot read, and why.
    """

    options: VerifyOptions
    reference: Path
    artefact: Path | None
    family: str
    task: Task
    task_source: str
    query_instruction: str | None
    recipe: LoadedRecipe
    panels: tuple[Panel, ...]
    left_out: str = ""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the parts of one verification must have in common."""
        options = self.options
        return {
            "artefact": options.artefact, "reference": options.reference, "task": self.task.value,
            "panels": [panel.sha256 for panel in self.panels], "limit": options.limit, "dtype": options.dtype,
            "noise_queries": options.noise_queries, "query_instruction": self.query_instruction,
            "panel_sources": list(options.panels), "recipe_text": self.recipe.text,
            "shard": str(options.shard) if options.shard else None,
        }  # fmt: skip


def open_case(options: VerifyOptions) -> Case:
    """Find the models, read what they declare, check recipe and panels."""
    if not options.structure_only:
        require_extra("score", "Scoring the reference", "pass --structure-only (and --weights, --rederive)")
    reference = resolve(options.reference, options.revision, options.token).directory
    declared = detect(reference, options.task)
    artefact = _located(options)
    if artefact is not None and not options.structure_only and gguf_file(str(artefact)) is not None:
        require_extra("llamacpp", "Scoring a GGUF file", "pass --structure-only (and --weights, --rederive)")
    task, task_source = _task(declared, artefact, options.task)
    recipe = _recipe(options, artefact)
    check_names(recipe.recipe.gates)
    left_out = ""
    if not options.panels:
        chosen, left_out = _default_panels(options, declared, artefact, task)
        options = replace(options, panels=chosen)
    panels = () if options.structure_only else tuple(_panels(options, declared))
    instruction = embedder_prompt(is_vision=declared.architecture.is_vision).query_instruction or None
    return Case(
        options, reference, artefact, declared.architecture.family, task, task_source, instruction, recipe, panels,
        left_out,
    )  # fmt: skip


def artefact_runtime(options: VerifyOptions, path: Path | None, task: Task, family: str) -> RuntimeOptions:
    """How to open the artefact that lies at `path`, or behind an address for None."""
    if path is None:
        return RuntimeOptions(
            task, engine=options.engine, served_model=options.served_model, concurrency=options.concurrency,
            timeout=options.timeout, family=family,
        )  # fmt: skip
    if gguf_file(str(path)) is not None:  # it runs as its file says
        return RuntimeOptions(task, mmproj=options.mmproj)
    return RuntimeOptions(task, options.dtype, options.device, mmproj=options.mmproj)


def _located(options: VerifyOptions) -> Path | None:
    if options.artefact.startswith(_URL):
        if options.structure_only:
            raise UsageError(
                f"{options.artefact} shows no files, so it has no structure to check.", "Leave out --structure-only."
            )
        return None
    path = Path(options.artefact)
    return path if path.is_file() else resolve(options.artefact, None, options.token).directory


def _task(reference: Detection, artefact: Path | None, asked: Task | None) -> tuple[Task, str]:
    """The reference's task, else the artefact's; where both are checkpoints that say so, they must agree."""
    if artefact is None or not (artefact / "config.json").is_file():
        return reference.require_task(), reference.task_source
    found = detect(artefact, asked)
    if reference.architecture.family != found.architecture.family:
        raise ModelError(f"The artefact is a {found.architecture.name}, the reference a {reference.architecture.name}.")
    if None not in (reference.task, found.task) and reference.task is not found.task:
        raise ModelError(
            f"The artefact is for {found.task_source}, the reference for {reference.task_source}.",
            "One of the two folders is not what it was meant to be; --task overrides both.",
        )
    source = reference if reference.task else found
    return source.require_task(), source.task_source


def _recipe(options: VerifyOptions, artefact: Path | None) -> LoadedRecipe:
    """What --recipe names, else the recipe that the artefact was made by, else the default's gates."""
    if options.recipe is not None:
        return load_recipe(options.recipe)
    manifest = artefact / MANIFEST if artefact is not None else None
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
    options: VerifyOptions, reference: Detection, artefact: Path | None, task: Task
) -> tuple[tuple[str, ...], str]:
    """The built-in panels that both sides can read, and which others were left out and why."""
    panels, texts = (default_panels(is_vision=is_vision) for is_vision in (reference.architecture.is_vision, False))
    if options.structure_only or panels == texts:
        return panels, ""
    why = ""
    with suppress(ModelError):  # of a broken file, which is for the structure stage to say
        runtime = artefact_runtime(options, artefact, task, reference.architecture.family)
        why = texts_only(str(artefact or options.artefact), runtime)
    left_out = ", ".join(panel for panel in panels if panel not in texts)
    return (texts, f"{left_out} left out: {why}") if why else (panels, "")


def _panels(options: VerifyOptions, reference: Detection) -> list[Panel]:
    panels = [panel.shard(options.shard) for panel in load_panels(options.panels, options.limit)]
    if not reference.architecture.is_vision:
        for panel in panels:
            _refuse_pictures(panel, reference)
    return panels


def _refuse_pictures(panel: Panel, reference: Detection) -> None:
    for pair in panel.pairs:
        for item in (pair.query, pair.document):
            if item.image or item.video:
                raise UsageError(
                    f"Panel {panel.name}, query {pair.query.id!r}: item {item.id!r} holds a picture, and "
                    f"{reference.architecture.name} reads text only.",
                    "Choose a text panel for this model.",
                )
