"""Whatever a folder of GGUF files looks like, every stage takes the same language model and the same projector from it."""

from __future__ import annotations

import shutil
from contextlib import closing

import pytest
from PIL import Image

from qtool.artefact import open_artefact
from qtool.checks.inspect import inspect
from qtool.checks.prompts import compare_prompts
from qtool.checks.rederive import rederive
from qtool.checks.reference import reference_in
from qtool.checks.stage import Outcome
from qtool.checks.structure import check_structure
from qtool.checks.weights import compare_weights
from qtool.errors import ModelError, UsageError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.inputs.items import Item, Pair
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.storage.gguf import uint32
from tests.checks.good import ArtefactBuilder
from tests.scoring.gguf_files import changed

COUNT = 5
PARTS = [f"model-{number:05}-of-{COUNT:05}.gguf" for number in range(1, COUNT + 1)]
PICTURE = Image.new("RGB", (64, 64), "red")
QUESTIONS = [
    Pair(Item("q", ("a ball",)), Item("d", ("a red ball",))),
    Pair(Item("q", ("a ball",)), Item("p", (), (PICTURE,))),
]


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    pytest.importorskip("xllamacpp")
    return ArtefactBuilder(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def parts(builder, tmp_path_factory):
    """The same model in several parts."""
    folder = tmp_path_factory.mktemp("split") / "parts"
    options = ConvertOptions(
        model=str(builder.reference("reranker")),
        output=folder,
        outtypes=("f16",),
        mmproj="none",
        split_max_bytes=120_000,
    )
    convert_gguf(options)
    for path, name in zip(sorted(folder.glob("*.gguf")), PARTS, strict=True):
        path.rename(folder / name)
    return [folder / name for name in PARTS]


def lay_out(layout, builder, parts, folder):
    """A folder of that layout; the paths of the language model and of its projector in it."""
    good = builder.good("reranker/gguf-f16")
    wanted = {
        "a misfit beside": ("model.gguf", "mmproj-F16.gguf"),
        "a broken one beside": ("model.gguf", "mmproj-F16.gguf"),
        "two that fit, one named after the model": ("model.gguf", "mmproj-model.gguf"),
        "capital letters": ("Model-F16.GGUF", "MMProj-F16.GGUF"),
        "split parts": (PARTS[0], "mmproj.gguf"),
        "split parts, two that fit": (PARTS[0], "mmproj-model.gguf"),
        "a folder for each type": ("F16/model.gguf", "mmproj.gguf"),
    }
    language, projector = (folder / name for name in wanted[layout])
    language.parent.mkdir(exist_ok=True)
    if layout.startswith("split"):
        for path in parts:
            shutil.copy(path, folder)
    else:
        shutil.copyfile(good / "model.gguf", language)
    shutil.copyfile(good / "mmproj.gguf", projector)
    if "misfit" in layout:
        changed(projector, folder / "MMPROJ-other.gguf", {"clip.vision.projection_dim": uint32(999)})
    if "broken" in layout:
        (folder / "mmproj-broken.gguf").write_bytes(b"GGUF")
    if "two that fit" in layout:
        shutil.copyfile(projector, folder / "mmproj-other.gguf")
    return language, projector


LAYOUTS = (
    "a misfit beside",
    "a broken one beside",
    "two that fit, one named after the model",
    "capital letters",
    "split parts",
    "split parts, two that fit",
)


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        *((layout, named) for layout in LAYOUTS for named in ("file", "folder")),
        ("a folder for each type", "folder"),
    ],
)
def test_all_stages_find_the_same_files(layout, named, builder, parts, tmp_path):
    folder = tmp_path / "artefact"
    folder.mkdir()
    language, projector = lay_out(layout, builder, parts, folder)
    target = str(folder if named == "folder" else language)

    if not (layout == "a broken one beside" and named == "folder"):  # there every file is asked about
        report = inspect(target)
        assert report.artefacts[0].findings == ()
        assert report.artefacts[0].markers["projector"] == projector.name

    artefact, reference = open_artefact(target), reference_in(builder.reference("reranker"))
    assert (artefact.path, artefact.projector.path) == (language, projector)
    stage = check_structure(artefact, reference)
    assert (stage.outcome, stage.findings) == (Outcome.PASS, ())
    stage, errors = compare_weights(artefact, reference)
    assert (stage.outcome, stage.findings) == (Outcome.PASS, ())
    assert {"blk.0.attn_q.weight", "v.blk.0.attn_qkv.weight"} <= {each.tensor for each in errors}
    stage, table = rederive(artefact, reference, tmp_path)
    assert (stage.outcome, stage.findings) == (Outcome.PASS, ())
    assert all(row.is_equal for row in table)
    with closing(open_runtime(artefact)) as scorer:
        stage = compare_prompts(open_runtime(reference), scorer, QUESTIONS, reference, target)
        assert (stage.outcome, stage.findings) == (Outcome.PASS, ())
        assert len(scorer.score(QUESTIONS)) == len(QUESTIONS)
        with closing(open_runtime(target)) as again:
            assert again.identity == scorer.identity


def test_two_projectors_that_fit_must_be_chosen_from_in_every_stage(builder, tmp_path):
    good, folder = builder.good("reranker/gguf-f16"), tmp_path / "artefact"
    shutil.copytree(good, folder)
    one, two = ((folder / "mmproj.gguf").rename(folder / "mmproj-a.gguf"), folder / "MMPROJ-B.gguf")
    shutil.copyfile(one, two)
    reference = reference_in(builder.reference("reranker"))
    assert inspect(str(folder / "model.gguf")).artefacts[0].markers["projector"] == "MMPROJ-B.gguf, mmproj-a.gguf"
    stages = (
        check_structure,
        compare_weights,
        lambda artefact, reference: rederive(artefact, reference, tmp_path),
        lambda artefact, _: open_runtime(artefact),
    )
    for stage in stages:
        with pytest.raises(UsageError, match=r"holds 2 projectors, not one: MMPROJ-B\.gguf, mmproj-a\.gguf") as refused:
            stage(open_artefact(str(folder)), reference)
        assert "--mmproj" in refused.value.hint
    for chosen in (one, two):
        artefact = open_artefact(str(folder), mmproj=chosen)
        assert artefact.projector.path == chosen
        assert check_structure(artefact, reference).outcome is Outcome.PASS
        with closing(open_runtime(str(folder), RuntimeOptions(mmproj=chosen))) as scorer:
            assert scorer.prompt_seen(QUESTIONS[0]) is not None


def test_whichever_part_is_named_the_whole_model_is_opened(parts):
    for part in parts:
        artefact = open_artefact(str(part))
        assert artefact.path == parts[0]
        assert artefact.model.paths == tuple(parts)


@pytest.mark.parametrize("lost", range(COUNT))
def test_a_lost_part_is_found_in_structure_and_not_scored(lost, builder, parts, tmp_path):
    for path in parts:
        shutil.copy(path, tmp_path)
    (tmp_path / parts[lost].name).unlink()
    artefact = open_artefact(str(tmp_path))
    stage = check_structure(artefact, reference_in(builder.reference("reranker")))
    assert "gguf-missing-part" in [each.code for each in stage.findings]
    with pytest.raises(ModelError, match=f"split into {COUNT} parts, and {parts[lost].name} is missing"):
        open_runtime(artefact)


def test_a_folder_with_a_projector_of_another_name_or_a_broken_model(builder, tmp_path):
    good = builder.good("reranker/gguf-f16")
    shutil.copy(good / "model.gguf", tmp_path)
    shutil.copy(good / "mmproj.gguf", tmp_path / "vision.gguf")
    artefact = open_artefact(str(tmp_path))
    assert (artefact.path, artefact.projector) == (tmp_path / "model.gguf", None)  # llama.cpp does not find it, either
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"holds 2 language models, not one: model\.gguf, other\.gguf"):
        open_artefact(str(tmp_path))
