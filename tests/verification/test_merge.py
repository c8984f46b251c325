from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qtool.arch.spec import Task
from qtool.errors import UsageError
from qtool.inputs.shards import Shard
from qtool.scoring import reference
from qtool.verification.case import VerifyOptions
from qtool.verification.folder import REPORT, prepare
from qtool.verification.gate import Verdict
from qtool.verification.merge import merge_reports
from qtool.verification.report import Report
from qtool.verification.run import verify
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


def run(models: tuple[Path, Path], panel: Path, output: Path, **options: object) -> Report:
    prepare(output, force=False)
    chosen = {"task": Task.RERANK, "noise_queries": 2, "use_cache": False, "keep_going": True, **options}
    report = verify(VerifyOptions(str(models[1]), str(models[0]), (str(panel),), output=output, device="cpu", **chosen))
    (output / REPORT).write_text(report.to_json())
    return report


@pytest.mark.parametrize("task", list(Task))
def test_shards_judged_together_are_one_verification(models, panel: Path, tmp_path: Path, task: Task) -> None:
    whole = run(models, panel, tmp_path / "whole", task=task)
    shards = [tmp_path / f"shard{index}" for index in (1, 2)]
    parts = [run(models, panel, folder, task=task, shard=Shard(i, 2)) for i, folder in enumerate(shards, start=1)]
    assert [part.verdict for part in parts] == [Verdict.UNGATED, Verdict.UNGATED]
    assert all(not part.gates for part in parts)
    prepare(tmp_path / "merged", force=False)
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


def test_what_is_no_part_of_one_verification_is_refused(models, panel: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    run(models, panel, folders[0], shard=Shard(1, 2))
    run((models[0], models[0]), panel, folders[1], shard=Shard(2, 2))
    run(models, panel, folders[2], shard=Shard(2, 2))
    output = tmp_path / "merged"
    with pytest.raises(UsageError, match=r"no parts of one verification: artefact is .*one and .*"):
        merge_reports(folders[:2], output)
    with pytest.raises(UsageError, match=r"These are the shards 1/2; a whole verification is 1/2, 2/2"):
        merge_reports(folders[:1], output)
    with pytest.raises(UsageError, match=r"shards 1/2, 1/2;"):
        merge_reports([folders[0], shutil.copytree(folders[0], tmp_path / "again")], output)
    with pytest.raises(UsageError, match="holds no finished verification"):
        merge_reports([tmp_path], output)
    panel.write_text(panel.read_text().replace("which", "what"))
    with pytest.raises(UsageError, match="its hash differs"):
        merge_reports([folders[0], folders[2]], output)


def test_a_shard_that_lost_answers_is_refused_by_name(models, panel: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(folders, start=1):
        run(models, panel, folder, shard=Shard(index, 2))
    ledger = folders[1] / "answers" / "artefact.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UsageError, match=r"No run has answered query 'q\d', document 'd\d'"):
        merge_reports(folders, tmp_path / "merged")


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


def test_a_finished_verification_is_replaced_only_when_told_to(models, panel: Path, tmp_path: Path) -> None:
    run(models, panel, tmp_path / "out")
    with pytest.raises(UsageError, match="holds a finished verification"):
        prepare(tmp_path / "out", force=False)
    prepare(tmp_path / "out", force=True)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["answers"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear diary")
    with pytest.raises(UsageError, match="no verification's"):
        prepare(tmp_path / "mine", force=True)
