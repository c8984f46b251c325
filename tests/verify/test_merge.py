from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qtool.arch.spec import Task
from qtool.checks.stage import PROMPT, Outcome, Stage
from qtool.errors import QtoolError, SetupError, UsageError
from qtool.inputs.panels import PanelShard
from qtool.reporting.run import merge_reports, verify
from qtool.scoring.transformers import runtime as reference
from qtool.verify.case import REPORT, VerifyOptions
from qtool.verify.gates import Verdict
from qtool.verify.report import Report
from tests.scoring import tiny

LINES = [
    {"id": f"q{n}", "query": f"which ball {n}?", "documents": [{"text": f"ball {n} {m}", "label": m} for m in range(3)]}
    for n in range(5)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("merge")
    return tiny.write_text(folder / "one"), tiny.write_text(folder / "other", seed=3)


@pytest.fixture
def panel(tmp_path: Path) -> Path:
    path = tmp_path / "balls.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


def run(models: tuple[Path, Path], panel: Path, output: Path, *, force: bool = False, **options: object) -> Report:
    chosen = {"task": Task.RERANK, "noise_queries": 2, "use_cache": False, "keep_going": True, **options}
    sides = {"artefact": str(models[1]), "reference": str(models[0])}
    return verify(VerifyOptions(**sides, panels=(str(panel),), output=output, device="cpu", force=force, **chosen))


@pytest.mark.parametrize("task", list(Task))
def test_shards_judged_together_are_one_verification(models, panel: Path, tmp_path: Path, task: Task) -> None:
    whole = run(models, panel, tmp_path / "whole", task=task)
    shards = [tmp_path / f"shard{index}" for index in (1, 2)]
    parts = [run(models, panel, folder, task=task, shard=PanelShard(i, 2)) for i, folder in enumerate(shards, start=1)]
    assert [part.verdict for part in parts] == [Verdict.UNGATED, Verdict.UNGATED]
    assert all(not part.gates for part in parts)
    merged = merge_reports(shards, tmp_path / "merged")
    # What bf16 rounds depends on which prompts are read together, so the noise is alike and not equal.
    assert merged.noise.pairs == whole.noise.pairs
    assert merged.noise.p50 == pytest.approx(whole.noise.p50, rel=1)
    assert [(gate.metric, gate.outcome) for gate in merged.gates] == [
        (gate.metric, gate.outcome) for gate in whole.gates
    ]
    assert merged.panels[0].metrics == pytest.approx(whole.panels[0].metrics, abs=1e-5)
    assert merged.panels[0].worst[0].query_id == whole.panels[0].worst[0].query_id
    assert merged.verdict is whole.verdict
    assert all(seconds > 0 for name, seconds in times(whole).items() if name in ("noise", "scores"))
    assert sum(times(whole).values()) <= whole.seconds
    for name in ("noise", "scores", "ranking"):
        assert times(merged)[name] == pytest.approx(sum(times(part)[name] for part in parts), abs=1e-3)


def times(report: Report) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in report.stages}


def test_what_is_no_part_of_one_verification_is_refused(models, panel: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    run(models, panel, folders[0], shard=PanelShard(1, 2))
    run((models[0], models[0]), panel, folders[1], shard=PanelShard(2, 2))
    run(models, panel, folders[2], shard=PanelShard(2, 2))
    output = tmp_path / "merged"
    with pytest.raises(UsageError, match=r"are not shards of one verification: artefact is .*one and .*"):
        merge_reports(folders[:2], output)
    with pytest.raises(UsageError, match=r"The folders hold shards 1/2; a whole verification is 1/2, 2/2"):
        merge_reports(folders[:1], output)
    with pytest.raises(UsageError, match=r"shards 1/2, 1/2;"):
        merge_reports([folders[0], shutil.copytree(folders[0], tmp_path / "again")], output)
    with pytest.raises(UsageError, match="holds no finished verification"):
        merge_reports([tmp_path], output)
    panel.write_text(panel.read_text().replace("which", "what"))
    with pytest.raises(UsageError, match="its sha256 differs"):
        merge_reports([folders[0], folders[2]], output)


def test_a_shard_that_lost_answers_is_refused_by_name(models, panel: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(folders, start=1):
        run(models, panel, folder, shard=PanelShard(index, 2))
    ledger = folders[1] / "answers" / "artefact.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(
        UsageError, match=r"b lacks answers of artefact\. No run .* query 'q3', document 'd3'\."
    ) as caught:
        merge_reports(folders, tmp_path / "merged")
    assert "Verify that shard again" in caught.value.hint


def test_an_embedder_shard_that_lost_vectors_is_refused_by_name(models, panel: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(folders, start=1):
        run(models, panel, folder, shard=PanelShard(index, 2), task=Task.EMBED)
    ledger = folders[0] / "answers" / "reference-bf16.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(
        UsageError, match=r"a lacks answers of reference-bf16\. No run has answered item .*, nor 1 more\."
    ):
        merge_reports(folders, tmp_path / "merged")


def test_a_whole_verification_is_no_shard(models, panel: Path, tmp_path: Path) -> None:
    run(models, panel, tmp_path / "whole")
    with pytest.raises(UsageError, match="whole holds a whole verification, not a shard") as caught:
        merge_reports([tmp_path / "whole"], tmp_path / "merged")
    assert caught.value.hint == f"Its verdict is final: see {tmp_path / 'whole' / REPORT}."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"schema_version": 3, "artef',
            r"report\.json is not a report .*: it is not valid JSON \(Unterminated string",
        ),
        ("", r"this version reads: it is not valid JSON"),
        ("[]", r"its schema version is None, expected 2 or 3"),
        ('{"schema_version": 1}', r"report\.json is not a report .*: its schema version is 1, expected 2 or 3"),
        ('{"schema_version": 3}', r"not a report that this version reads: artefact: Field required"),
        ('{"schema_version": 2, "weights": 7}', r"not a report that this version reads: artefact: Field required"),
        ('{"schema_version": 2, "weights": [7]}', r"not a report that this version reads: artefact: Field required"),
    ],
)
def test_a_report_that_is_broken_or_of_another_version_is_refused_with_what_to_do(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / REPORT).write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        merge_reports([tmp_path], tmp_path / "merged")
    assert caught.value.hint.startswith("Verify that shard again")


def test_an_interrupted_run_goes_on_without_asking_again(
    models, panel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(models, panel, tmp_path / "out")
    (tmp_path / "out" / REPORT).unlink()

    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(reference, "load", refuse)
    again = run(models, panel, tmp_path / "out")
    assert again.panels == first.panels
    assert again.noise == first.noise


def aged(folder: Path) -> None:
    """Make of a finished run what qtool left when reports had schema version 2."""
    (folder / "answers" / "reference-bf16.jsonl").rename(folder / "answers" / "noise.jsonl")
    report = json.loads((folder / REPORT).read_text())
    weights = [{**each, "hf_name": each["tensor"]} for each in report["weights"]]
    for each in weights:
        del each["tensor"]
    (folder / REPORT).write_text(json.dumps({**report, "schema_version": 2, "weights": weights}))


def test_older_runs_are_merged_with_runs_of_today(models, panel: Path, tmp_path: Path) -> None:
    shards = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(shards, start=1):
        run(models, panel, folder, shard=PanelShard(index, 2), weights=True)
    before = merge_reports(shards, tmp_path / "before")
    aged(shards[0])
    after = merge_reports(shards, tmp_path / "after")
    assert before.weights
    assert before == after
    assert sorted(path.name for path in (tmp_path / "after" / "answers").iterdir()) == [
        "artefact.jsonl", "reference-bf16.jsonl", "reference.jsonl",
    ]  # fmt: skip


def test_an_older_interrupted_run_is_resumed(
    models, panel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(models, panel, tmp_path / "out")
    aged(tmp_path / "out")
    (tmp_path / "out" / REPORT).unlink()
    monkeypatch.setattr(reference, "load", lambda *_: pytest.fail("a model was loaded"))
    assert run(models, panel, tmp_path / "out").noise == first.noise


def test_force_removes_the_answers_of_an_older_run(models, panel: Path, tmp_path: Path) -> None:
    run(models, panel, tmp_path / "out")
    aged(tmp_path / "out")
    run(models, panel, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "answers" / "noise.jsonl").exists()


def stopped(models, panel: Path, output: Path, **options: object) -> Report:
    """A run whose prompt stage fails, so that nothing is asked."""
    stage = Stage(PROMPT, Outcome.FAIL, "the artefact reads something else")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtool.verify.run.check_prompts", lambda *_: stage)
        return run(models, panel, output, keep_going=False, **options)


def test_the_order_of_shards_changes_nothing_where_one_lies_past_the_queries_asked_for_noise(
    models, panel: Path, tmp_path: Path
) -> None:
    shards = [tmp_path / "a", tmp_path / "b"]
    parts = [
        run(models, panel, folder, shard=PanelShard(i, 2), noise_queries=1) for i, folder in enumerate(shards, start=1)
    ]
    assert [part.noise is None for part in parts] == [False, True]
    one = merge_reports(shards, tmp_path / "one")
    other = merge_reports(shards[::-1], tmp_path / "other")
    assert one.noise is not None
    assert (one.noise, one.gates, one.verdict) == (other.noise, other.gates, other.verdict)
    assert not (shards[1] / "answers" / "reference-bf16.jsonl").exists()


@pytest.mark.parametrize("first", [0, 1])
def test_a_shard_that_an_earlier_stage_stopped_fails_the_whole(models, panel: Path, tmp_path: Path, first: int) -> None:
    same = (models[0], models[0])
    shards = [tmp_path / "a", tmp_path / "b"]
    assert not stopped(same, panel, shards[0], shard=PanelShard(1, 2)).panels
    assert run(same, panel, shards[1], shard=PanelShard(2, 2)).panels
    merged = merge_reports([shards[first], shards[1 - first]], tmp_path / "merged")
    assert merged.verdict is Verdict.FAIL
    assert (merged.panels, merged.gates) == ((), ())
    assert {stage.name: stage.outcome for stage in merged.stages} == {
        "structure": Outcome.PASS, "prompt": Outcome.FAIL,
        "noise": Outcome.SKIPPED, "scores": Outcome.SKIPPED, "ranking": Outcome.SKIPPED,
    }  # fmt: skip
    assert merged.stages[-1].summary == "Not run: the stage prompt failed."


def test_scored_shards_are_compared_also_where_the_first_was_stopped(models, panel: Path, tmp_path: Path) -> None:
    shards = [tmp_path / name for name in "abc"]
    stopped((models[0], models[0]), panel, shards[0], shard=PanelShard(1, 3))
    for index in (2, 3):
        run((models[0], models[0]), panel, shards[index - 1], shard=PanelShard(index, 3))
    report = json.loads((shards[2] / REPORT).read_text())
    report["artefact"]["engine"] = "another"
    (shards[2] / REPORT).write_text(json.dumps(report))
    with pytest.raises(UsageError, match=r"b and .*c are not shards of one verification: artefact engine is"):
        merge_reports(shards, tmp_path / "merged")


@pytest.mark.parametrize("role", ["reference", "reference-bf16", "artefact"])
def test_shards_that_all_lost_the_answers_of_one_role_do_not_pass(
    models, panel: Path, tmp_path: Path, role: str
) -> None:
    run(models, panel, tmp_path / "a", shard=PanelShard(1, 1))
    (tmp_path / "a" / "answers" / f"{role}.jsonl").unlink()
    with pytest.raises(UsageError, match=f"No shard holds the answers of {role}"):
        merge_reports([tmp_path / "a"], tmp_path / "merged")


def test_shards_of_which_only_the_structure_was_asked_are_merged(models, panel: Path, tmp_path: Path) -> None:
    shards = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(shards, start=1):
        run((models[0], models[0]), panel, folder, shard=PanelShard(index, 2), structure_only=True)
    merged = merge_reports(shards, tmp_path / "merged")
    assert (merged.verdict, merged.panels) == (Verdict.PASS, ())


def test_a_merge_that_is_refused_takes_nothing_from_its_output_nor_its_shards(
    models, panel: Path, tmp_path: Path
) -> None:
    shards = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(shards, start=1):
        run(models, panel, folder, shard=PanelShard(index, 2))
    output = tmp_path / "merged"
    merge_reports(shards, output)
    (shards[1] / "again").symlink_to(shards[1])
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="is one of the shards"):
        merge_reports(shards, shards[0], force=True)
    with pytest.raises(UsageError, match="is one of the shards"):
        merge_reports(shards, shards[1] / "again", force=True)
    with pytest.raises(UsageError, match="a whole verification is"):
        merge_reports(shards[:1], output, force=True)
    with pytest.raises(UsageError, match="holds a finished verification"):
        merge_reports(shards, output)
    with pytest.raises(SetupError, match="is not a folder"):
        merge_reports(shards, panel / "x")
    assert contents(tmp_path) == before
    ledger = shards[1] / "answers" / "artefact.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UsageError, match="No run has answered"):
        merge_reports(shards, output, force=True)
    assert contents(output) == {path: held for path, held in before.items() if path.is_relative_to(output)}


def test_a_merge_does_not_replace_the_answers_of_an_unfinished_run_unasked(models, panel: Path, tmp_path: Path) -> None:
    shards = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(shards, start=1):
        run(models, panel, folder, shard=PanelShard(index, 2))
    output = tmp_path / "unfinished"
    run(models, panel, output)
    (output / REPORT).unlink()
    before = contents(output)
    with pytest.raises(UsageError, match="holds answers of an unfinished verification"):
        merge_reports(shards, output)
    assert contents(output) == before
    assert merge_reports(shards, output, force=True).panels


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_force_takes_nothing_from_a_finished_folder_before_models_panels_and_recipe_are_found(
    models, panel: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(models, panel, output)
    before = contents(output)
    sides = {"artefact": str(models[1]), "reference": str(models[0])}
    options = VerifyOptions(**sides, panels=(str(panel),), task=Task.RERANK, output=output, force=True)
    for typo in ({"reference": str(tmp_path / "modle")}, {"panels": ("demo-taste",)}, {"recipe": "nvpf4"}):
        with pytest.raises(QtoolError):
            verify(replace(options, **typo))
        assert contents(output) == before


def test_a_finished_verification_is_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text('{"artefact": {}, "reference": {}, "verdict": "pass"}')
    options = VerifyOptions(artefact="no-such-artefact", reference="no-such-reference", output=tmp_path)
    with pytest.raises(UsageError, match="holds a finished verification"):
        verify(options)


def test_force_begins_an_unfinished_verification_of_other_models_anew(models, panel: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(models, panel, output)
    (output / REPORT).unlink()
    with pytest.raises(UsageError, match="answers of another run"):
        run(models[::-1], panel, output)
    assert run(models[::-1], panel, output, force=True).panels
