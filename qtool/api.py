"""The public functions: each takes keywords or an options object, draws a progress bar, and returns a result.

A function calls the job of the same name. Its keywords are the fields of the job's options, which convert and check them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

from qtool import console
from qtool.errors import UsageError
from qtool.keywords import dataset_panels, options_of, panel_of, refuse_keywords, runtime_of, texts_of
from qtool.options import Options, coerce, parse_size
from qtool.progress import Progress, StageProgress, ignore
from qtool.redaction import keep_secret
from qtool.resources import DEFAULT_RECIPE

if TYPE_CHECKING:
    from qtool.arch.spec import Task
    from qtool.calibration.calibrate import CalibrateOptions, Calibration
    from qtool.calibration.tune import Tuned, TuneOptions
    from qtool.checks.report import InspectionReport
    from qtool.export.convert import ConversionSummary
    from qtool.export.gguf_metadata import PromptChoice
    from qtool.export.gguf_plan import ConvertOptions
    from qtool.export.quantize import Backend, Effort, QuantizationSummary, QuantizeOptions
    from qtool.export.repair import RepairOptions, RepairSummary
    from qtool.inputs.panels import PanelShard
    from qtool.reporting.several import Reports
    from qtool.scoring.embed import Embeddings, EmbedOptions
    from qtool.scoring.llama_cpp.server import LlamaCppOptions
    from qtool.scoring.runtime import RuntimeOptions
    from qtool.scoring.score import ScoreOptions, Scores
    from qtool.scoring.scorer import Scorer
    from qtool.verify.case import VerifyOptions
    from qtool.verify.paired import Comparison
    from qtool.verify.report import Report

StrPath: TypeAlias = str | os.PathLike[str]
TaskName: TypeAlias = "Task | Literal['rerank', 'embed']"
Bar: TypeAlias = Literal["bar"]
"""The default of `progress`: a bar in a terminal or a notebook, nothing elsewhere. None draws nothing."""

OptionsT = TypeVar("OptionsT", bound=Options)


def quantize(
    model: StrPath | QuantizeOptions,
    *,
    output: StrPath | None = None,
    recipe: StrPath = DEFAULT_RECIPE,
    backend: Backend = "auto",
    task: TaskName | None = None,
    revision: str | None = None,
    token: str | None = None,
    max_shard_size: int | str = "512MiB",
    stream: bool | None = None,
    force: bool = False,
    dry_run: bool = False,
    data: Sequence[StrPath] | StrPath = (),
    dataset: str | None = None,
    columns: str | None = None,
    limit: int | None = None,
    effort: Effort | None = None,
    memory: int | str = "auto",
    device: str = "auto",
    progress: Progress | StageProgress | Bar | None = "bar",
) -> QuantizationSummary:
    """Quantize a checkpoint to NVFP4 by a recipe, into the folder `output`.

    `model` is a folder, `org/name`, `hf://org/name@revision` or a demo model. With `dry_run`, or without `output`, the
    result says what would be written. With `stream` the weights of a repository are read by range and not stored; by
    default that is done where the disk is too short. `progress` may be a callable, called with the bytes done and in all.

    A recipe that fits weights to data takes `data` (calibration sets, panels by name or path) or a `dataset` with its
    `columns`, of each the first `limit` queries, and `effort`, `memory` and `device`; its `progress` is a `StageProgress`,
    called with a stage first: "gradients" and "calibrating", in tokens of all layers and such as "calibrating, layer 3 of
    28", and "writing", in bytes.
    """
    keywords = dict(locals())
    from qtool.export.quantize import QuantizeOptions
    from qtool.export.quantize import quantize as run
    from qtool.recipe import load_recipe

    keywords["max_shard_bytes"] = parse_size(max_shard_size)
    if not isinstance(model, QuantizeOptions):
        keywords["data"] = (*coerce("data", data, tuple[str, ...]), *dataset_panels(keywords))
    options = options_of(quantize, QuantizeOptions, keywords)
    if load_recipe(options.recipe).recipe.calibration is not None:
        from qtool.calibration.quantize import quantize_calibrated

        with _stages("tokens", cast("StageProgress | Bar | None", progress)) as shown_stages:
            return quantize_calibrated(options, shown_stages)
    with _bytes("Quantizing", cast("Progress | Bar | None", progress)) as shown:
        return run(options, shown)


def convert_gguf(
    model: StrPath | ConvertOptions,
    *,
    output: StrPath | None = None,
    outtypes: Sequence[str] | str = ("auto",),
    mmproj: str = "f16",
    task: TaskName | None = None,
    instruction: str | None = None,
    prompt: PromptChoice = "official",
    split_max_size: int | str | None = None,
    imatrix: StrPath | None = None,
    tensor_types: Sequence[str] | str = (),
    tensor_type_file: StrPath | None = None,
    stream: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | Bar | None = "bar",
) -> ConversionSummary:
    """Convert a checkpoint to GGUF files in `output`, a folder or one file that ends in .gguf.

    `outtypes` are auto (which loses nothing), f32, f16, bf16, q8_0, nvfp4, q6_k, q5_k_m, q4_k_m or iq4_xs; `mmproj` is
    the type of the vision projector, or none; `stream` is `quantize`'s. `tensor_types` such as "attn_v=q6_k" choose types
    of single matrices of K- and I-quants; `tensor_type_file` holds more. With `dry_run`, or without `output`, the result
    says what would be written.
    """
    keywords = dict(locals())
    from qtool.export.convert import convert_gguf as run
    from qtool.export.gguf_plan import ConvertOptions

    if split_max_size is not None:
        keywords["split_max_bytes"] = parse_size(split_max_size)
    options = options_of(convert_gguf, ConvertOptions, keywords)
    with _bytes("Converting", progress) as shown:
        return run(options, shown)


def calibrate(
    model: StrPath | CalibrateOptions,
    *,
    data: Sequence[StrPath] | StrPath = (),
    dataset: str | None = None,
    columns: str | None = None,
    output: StrPath | None = None,
    hessians: StrPath | None = None,
    predict: bool = False,
    limit: int | None = None,
    hessian_memory: int | str = "2GiB",
    task: TaskName | None = None,
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    force: bool = False,
    progress: StageProgress | Bar | None = "bar",
) -> Calibration:
    """Run a checkpoint over calibration data, and write the second moments of its linears' inputs.

    `data` are built-in sets or panels by name, or JSONL files; by default the sets that fit the model. `output` is an
    importance matrix for llama.cpp (GGUF), `hessians` a safetensors file. With `predict` the result says how much of
    each group's error calibration is predicted to leave.
    """
    keywords = dict(locals())
    from qtool.calibration.calibrate import CalibrateOptions
    from qtool.calibration.calibrate import calibrate as run

    if not isinstance(model, CalibrateOptions):
        keywords["data"] = (*coerce("data", data, tuple[str, ...]), *dataset_panels(keywords))
        keywords["hessian_bytes"] = parse_size(hessian_memory)
    options = options_of(calibrate, CalibrateOptions, keywords)
    with _stages("prompts", progress) as shown:
        return run(options, shown)


def tune(
    model: StrPath | TuneOptions,
    *,
    budget: float | str | None = None,
    max_drift: float | None = None,
    output: StrPath | None = None,
    recipe: StrPath = "nvfp4-w4a16-calibrated",
    data: Sequence[StrPath] | StrPath = (),
    dataset: str | None = None,
    columns: str | None = None,
    limit: int | None = None,
    effort: Effort | None = None,
    memory: int | str = "auto",
    task: TaskName | None = None,
    revision: str | None = None,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: StageProgress | Bar | None = "bar",
) -> Tuned:
    """Find which fused groups stay unquantized, and write the recipe into the folder `output`, for `quantize`.

    `budget` is in bits per weight of the linears (5.0 or "5.0bpw"), `max_drift` the largest drift of the answers, centred,
    on the quarter of the queries that is held out; one of them is given. `data`, `effort` and `memory` are `quantize`'s.
    With `dry_run`, or without `output`, the result says how long it would take.
    """
    keywords = dict(locals())
    from qtool.calibration.tune import TuneOptions
    from qtool.calibration.tune import tune as run
    from qtool.reporting.tuning import pages

    if not isinstance(model, TuneOptions):
        keywords["data"] = (*coerce("data", data, tuple[str, ...]), *dataset_panels(keywords))
        keywords["budget"] = None if budget is None else str(budget)
    options = options_of(tune, TuneOptions, keywords)
    with _stages("units", progress) as shown:
        return run(options, shown, pages)


def repair_gguf(
    broken: StrPath | RepairOptions,
    *,
    output: StrPath | None = None,
    base: StrPath | None = None,
    task: TaskName | None = None,
    instruction: str | None = None,
    force: bool = False,
    progress: Progress | Bar | None = "bar",
) -> RepairSummary:
    """Write to `output` the GGUF file `broken` with the rank head, pooling and prompt that it lacks.

    `base` is a checkpoint whose rank head is taken instead of the file's own rows.
    """
    keywords = dict(locals())
    from qtool.export.repair import RepairOptions
    from qtool.export.repair import repair_gguf as run

    options = options_of(repair_gguf, RepairOptions, keywords)
    with _bytes("Repairing", progress) as shown:
        return run(options, shown)


def inspect(
    target: StrPath,
    *,
    task: TaskName | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: StageProgress | Bar | None = "bar",
) -> InspectionReport:
    """Say what a GGUF file, a folder or a repository on the hub is and whether it will work; only headers are read.

    `progress` may be a callable, called with the name of a stage, the number of files done and of all files.
    """
    from qtool.arch.spec import Task
    from qtool.checks.inspect import inspect as run

    keep_secret(token)
    with _stages("files", progress) as shown:
        return run(
            coerce("target", target, str),
            coerce("task", task, Task | None),
            coerce("revision", revision, str | None),
            coerce("token", token, str | None),
            shown,
        )


def score(
    target: StrPath | ScoreOptions,
    *,
    panel: StrPath | None = None,
    dataset: str | None = None,
    columns: str | None = None,
    limit: int | None = None,
    shard: PanelShard | str | None = None,
    allow_outside_files: bool = False,
    allow_local_addresses: bool = False,
    instruction: str | None = None,
    output: StrPath | None = None,
    force: bool = False,
    task: TaskName | None = None,
    dtype: str = "float32",
    device: str = "auto",
    memory: int | str = "auto",
    revision: str | None = None,
    token: str | None = None,
    mmproj: StrPath | None = None,
    llama_cpp: LlamaCppOptions | None = None,
    engine: str | None = None,
    served_model: str | None = None,
    family: str | None = None,
    concurrency: int = 8,
    timeout: float = 300.0,
    progress: StageProgress | Bar | None = "bar",
) -> Scores:
    """Score the pairs of a panel with a reranker: log-odds and probability of each.

    `target` is a folder, a GGUF file, `org/name`, a demo model or the URL of a server; `panel` is a JSONL file or a
    built-in panel, or `dataset` and `columns` describe one; it may name files outside of its folder and addresses of
    this machine and its network only where that is allowed. With `output`, a JSONL file, an interrupted run continues.
    """
    keywords = dict(locals())
    from qtool.scoring.score import ScoreOptions
    from qtool.scoring.score import score as run

    if not isinstance(target, ScoreOptions):
        keywords["runtime"] = runtime_of(keywords)
        keywords["panel"] = panel_of(keywords)
    options = options_of(score, ScoreOptions, keywords)
    with _stages("pairs", progress) as shown:
        return run(options, shown)


def embed(
    target: StrPath | EmbedOptions,
    *,
    texts: StrPath | Sequence[str] | None = None,
    panel: StrPath | None = None,
    dataset: str | None = None,
    columns: str | None = None,
    limit: int | None = None,
    shard: PanelShard | str | None = None,
    allow_outside_files: bool = False,
    allow_local_addresses: bool = False,
    instruction: str | None = None,
    output: StrPath | None = None,
    ids: StrPath | None = None,
    dim: int | None = None,
    force: bool = False,
    task: TaskName | None = None,
    dtype: str = "float32",
    device: str = "auto",
    memory: int | str = "auto",
    revision: str | None = None,
    token: str | None = None,
    mmproj: StrPath | None = None,
    llama_cpp: LlamaCppOptions | None = None,
    engine: str | None = None,
    served_model: str | None = None,
    family: str | None = None,
    concurrency: int = 8,
    timeout: float = 300.0,
    progress: StageProgress | Bar | None = "bar",
) -> Embeddings:
    """Embed a list of texts, a file of texts (one a line), or the queries and documents of a panel.

    `target` is what `score` takes; `dim` cuts the vectors and normalises them again. With `output`, a .npy file, the
    vectors are also written there, with `ids` beside them, and an interrupted run continues.
    """
    keywords = dict(locals())
    from qtool.scoring.embed import EmbedOptions
    from qtool.scoring.embed import embed as run

    if not isinstance(target, EmbedOptions):
        keywords["runtime"] = runtime_of(keywords)
        keywords["source"] = texts_of(keywords) or panel_of(keywords)
    options = options_of(embed, EmbedOptions, keywords)
    with _stages("items", progress) as shown:
        return run(options, shown)


def verify(
    artefact: StrPath | VerifyOptions,
    *,
    reference: StrPath | None = None,
    panels: Sequence[StrPath] | StrPath = (),
    dataset: str | None = None,
    columns: str | None = None,
    output: StrPath | None = None,
    recipe: StrPath | None = None,
    limit: int | None = None,
    shard: PanelShard | str | None = None,
    allow_outside_files: bool = False,
    allow_local_addresses: bool = False,
    task: TaskName | None = None,
    dtype: str = "float32",
    device: str = "auto",
    memory: int | str = "auto",
    mmproj: StrPath | None = None,
    revision: str | None = None,
    reference_revision: str | None = None,
    token: str | None = None,
    engine: str | None = None,
    served_model: str | None = None,
    concurrency: int = 8,
    timeout: float = 300.0,
    structure_only: bool = False,
    weights: bool = False,
    rederive: bool = False,
    data: Sequence[StrPath] | StrPath = (),
    keep_going: bool = False,
    noise_queries: int = 20,
    use_cache: bool = True,
    force: bool = False,
    progress: StageProgress | Bar | None = "bar",
) -> Report:
    """Prove that an artefact scores as its reference does; with `output`, a folder, write the reports there.

    `artefact` is a folder, a GGUF file, `org/name` or the URL of a server, `reference` the checkpoint it was made from.
    `panels` are JSONL files or built-in panels, by default those that both can read. The folder `output` also keeps
    every answer, and an interrupted run continues from there. `data` (and `dataset`) are what calibrated weights were
    fitted to, which `rederive` recognises by its hash.
    """
    keywords = dict(locals())
    from qtool.reporting.run import verify as run
    from qtool.verify.case import VerifyOptions

    if not isinstance(artefact, VerifyOptions):
        keywords["panels"] = (*coerce("panels", panels, tuple[str, ...]), *dataset_panels(keywords))
    options = options_of(verify, VerifyOptions, keywords)
    with _stages("items", progress) as shown:
        return run(options, shown, status=_show_finished_stage, command=console.settings.command)


def verify_all(artefacts: StrPath | Sequence[StrPath], **keywords: Any) -> Reports:
    """Verify several artefacts against one reference, which is scored once; the keywords are those of `verify`.

    A folder or repository of several GGUF models counts as all of them. With `output` each has a folder of its own in it.
    """
    from qtool.reporting.several import verify_each
    from qtool.verify.case import VerifyOptions

    known = {name: each.default for name, each in signature(verify).parameters.items() if name != "artefact"}
    for name in keywords.keys() - known.keys():
        raise TypeError(f"verify_all() got an unexpected keyword argument {name!r}")
    keywords = {**known, **keywords}
    targets = coerce("artefacts", artefacts, tuple[str, ...])
    keywords["artefact"] = targets[0] if targets else ""
    keywords["panels"] = (*coerce("panels", keywords["panels"], tuple[str, ...]), *dataset_panels(keywords))
    options = options_of(verify, VerifyOptions, keywords)
    with _stages("items", keywords["progress"]) as shown:
        return verify_each(targets, options, shown, status=_show_finished_stage, command=console.settings.command)


def compare(
    reports: Sequence[StrPath],
    *,
    baseline: StrPath | None = None,
    fail_if_worse: Sequence[str] | str = (),
    output: StrPath | None = None,
    force: bool = False,
) -> Comparison:
    """Put the artefacts of several reports side by side, with paired intervals of what differs on the same queries.

    `reports` are folders of `verify`, or their report.json; shards of one run are one artefact. `baseline` is one of them,
    by default the first. With `output`, a folder, compare.html and compare.json are written there. The result's `passed`
    says whether all others are no worse than the baseline in the metrics `fail_if_worse`.
    """
    from qtool.reporting.comparison import compare as run

    return run(
        coerce("reports", reports, tuple[Path, ...]),
        baseline=coerce("baseline", baseline, Path | None),
        fail_if_worse=coerce("fail_if_worse", fail_if_worse, tuple[str, ...]),
        output=coerce("output", output, Path | None),
        force=coerce("force", force, bool),
        command=console.settings.command,
    )


def merge_reports(
    folders: Sequence[StrPath],
    *,
    output: StrPath,
    allow_outside_files: bool = False,
    allow_local_addresses: bool = False,
    force: bool = False,
) -> Report:
    """Join the reports of all shards of a verification, judge them as one, and write the reports into `output`."""
    from qtool.inputs.media import MediaAccess
    from qtool.reporting.run import merge_reports as run

    return run(
        coerce("folders", folders, tuple[Path, ...]),
        coerce("output", output, Path),
        MediaAccess(
            coerce("allow_outside_files", allow_outside_files, bool),
            coerce("allow_local_addresses", allow_local_addresses, bool),
        ),
        force=coerce("force", force, bool),
    )


def open_runtime(
    target: StrPath,
    options: RuntimeOptions | None = None,
    *,
    task: TaskName | None = None,
    dtype: str = "float32",
    device: str = "auto",
    memory: int | str = "auto",
    revision: str | None = None,
    token: str | None = None,
    mmproj: StrPath | None = None,
    llama_cpp: LlamaCppOptions | None = None,
    engine: str | None = None,
    served_model: str | None = None,
    family: str | None = None,
    concurrency: int = 8,
    timeout: float = 300.0,
) -> Scorer:
    """Open what `score` and `embed` take as a scorer, whose `score` and `embed` answer pairs and items; close it after use."""
    keywords = dict(locals())
    from qtool.scoring.runtime import open_runtime as run

    if options is None:
        options = runtime_of(keywords)
    else:
        refuse_keywords(open_runtime, keywords, "target", "options")
    return run(coerce("target", target, str), options)


def _show_finished_stage(line: str) -> None:
    """What a stage found, as it ends: the log of a command, and all there is where an error ends it."""
    if console.settings.is_command:
        from qtool.checks.findings import printable

        console.show_status(printable(line))


def _bytes(label: str, progress: Progress | Bar | None) -> AbstractContextManager[Progress]:
    return _passed_on(progress) if progress != "bar" else console.byte_bar(label)


def _stages(unit: str, progress: StageProgress | Bar | None) -> AbstractContextManager[StageProgress]:
    return _passed_on(progress) if progress != "bar" else console.stage_bar(unit)


@contextmanager
def _passed_on(progress: Any) -> Iterator[Any]:
    """The caller's own progress, or none."""
    if progress is not None and not callable(progress):
        raise UsageError(f"Invalid progress {progress!r}: expected a callable, None or 'bar'.")
    yield progress or ignore
