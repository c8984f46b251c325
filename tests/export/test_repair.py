"""`repair-gguf`: what it adds, and that it touches nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf.constants import GGUFValueType

from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_metadata import NAMES_KEY
from qtool.export.gguf_plan import ConvertOptions
from qtool.export.repair import RepairOptions, repair_gguf
from qtool.storage.gguf import Value, array, read_gguf, string
from qtool.storage.gguf_layout import GgufOutputTensor, lay_out
from qtool.storage.gguf_model import RERANK_KEY
from qtool.storage.output_files import open_files
from tests.export.digests import digest
from tests.export.models import MODELS

HEAD = "cls.output.weight"
LABELS = "qwen3vl.classifier.output_labels"
RANKING = ("qwen3vl.pooling_type", LABELS, RERANK_KEY, NAMES_KEY)


def rewritten(source, target, *, without=(), fields=None, drop_fields=()):
    """A copy of a GGUF file with less or other things in it."""
    import numpy as np

    gguf, data = read_gguf(source), source.read_bytes()
    metadata = {key: value for key, value in gguf.metadata.items() if key not in drop_fields} | (fields or {})
    kept = [t for t in gguf.tensors.values() if t.gguf_name not in without]
    layouts = lay_out(target.name, metadata, [GgufOutputTensor(t.gguf_name, t.type, t.shape, t.nbytes) for t in kept])
    with open_files(layouts, target.parent) as files:
        for t in kept:
            files.write(t.gguf_name, 0, np.frombuffer(data[t.offset : t.offset + t.nbytes], np.uint8))
    return target


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """Right conversions of the demo reranker by type."""
    folder = tmp_path_factory.mktemp("right")
    model = MODELS["demo-reranker"](folder / "model")
    for outtype in ("f16", "q8_0"):
        convert_gguf(
            ConvertOptions(model=str(model), output=folder / f"{outtype}.gguf", outtypes=(outtype,), mmproj="none")
        )
    return folder


def plain(right, outtype, target):
    """What a conversion gives that takes the reranker for a chat model."""
    return rewritten(right / f"{outtype}.gguf", target, without=[HEAD], drop_fields=RANKING)


def test_a_plain_conversion_becomes_the_right_one(right, tmp_path):
    broken = plain(right, "f16", tmp_path / "plain.gguf")
    summary = repair_gguf(RepairOptions(broken=broken, output=tmp_path / "fixed.gguf"))
    assert digest(tmp_path / "fixed.gguf") == digest(right / "f16.gguf")
    assert len(summary.changes) == 5


def test_every_other_byte_stays(right, tmp_path):
    broken = plain(right, "q8_0", tmp_path / "plain.gguf")
    repair_gguf(RepairOptions(broken=broken, output=tmp_path / "fixed.gguf"))
    before, after = digest(broken), digest(tmp_path / "fixed.gguf")
    assert before["tensors"].items() <= after["tensors"].items()
    assert after["tensors"].keys() - before["tensors"].keys() == {HEAD}
    assert before["metadata"].items() <= after["metadata"].items()
    assert after["metadata"].keys() - before["metadata"].keys() == set(RANKING)


def test_a_quantized_embedding_gives_a_float_head_and_a_base_the_exact_one(right, tmp_path):
    broken = plain(right, "q8_0", tmp_path / "plain.gguf")
    repair_gguf(RepairOptions(broken=broken, output=tmp_path / "own.gguf"))
    repair_gguf(RepairOptions(broken=broken, output=tmp_path / "base.gguf", base=str(right / "model")))
    assert read_gguf(tmp_path / "own.gguf").tensors[HEAD].type.name == "F32"
    assert read_gguf(tmp_path / "base.gguf").tensors[HEAD].type.name == "BF16"


def test_only_the_wrong_prompt_is_replaced(right, tmp_path):
    wrong = rewritten(right / "f16.gguf", tmp_path / "wrong.gguf", fields={RERANK_KEY: string("{query} {document}")})
    summary = repair_gguf(RepairOptions(broken=wrong, output=tmp_path / "fixed.gguf"))
    assert len(summary.changes) == 1
    assert RERANK_KEY in summary.changes[0]
    assert digest(tmp_path / "fixed.gguf") == digest(right / "f16.gguf")


def test_an_instruction_of_its_own_is_no_fault(right, tmp_path):
    template = read_gguf(right / "f16.gguf").get(RERANK_KEY)
    own = template.replace(
        "Given a search query, retrieve relevant candidates that answer the query.", "Match colours."
    )
    assert own != template
    file = rewritten(right / "f16.gguf", tmp_path / "own.gguf", fields={RERANK_KEY: string(own)})
    with pytest.raises(UsageError, match="Nothing to repair"):
        repair_gguf(RepairOptions(broken=file, output=tmp_path / "fixed.gguf"))
    repair_gguf(RepairOptions(broken=file, output=tmp_path / "fixed.gguf", instruction="Match shapes."))
    assert "Match shapes." in read_gguf(tmp_path / "fixed.gguf").get(RERANK_KEY)


def with_head(source, target, make, labels=None):
    """A copy whose rank head is `make(head, embedding)`, both [rows, width] as float16, under other labels."""
    from dataclasses import replace
    from shutil import copyfile

    import numpy as np

    from tests.checks.rewriting import rewrite_gguf

    def change(tensors):
        head, table = (np.frombuffer(tensors[n].data, np.float16).reshape(-1, 256) for n in (HEAD, "token_embd.weight"))
        tensors[HEAD] = replace(tensors[HEAD], data=np.asarray(make(head, table), np.float16).tobytes())

    copyfile(source, target)
    rewrite_gguf(
        target, lambda fields: fields.update({LABELS: array(GGUFValueType.STRING, labels)}) if labels else None, change
    )
    return target


def trained(head, _):
    """Rows of no token, the first of them far from yes."""
    import numpy as np

    return np.random.default_rng(3).normal(size=head.shape)


@pytest.mark.parametrize("labels", [["yes", "no"], ["no", "yes"]])
def test_exchanged_rows_are_put_right_whatever_their_labels(labels, right, tmp_path):
    wrong = with_head(right / "f16.gguf", tmp_path / "wrong.gguf", lambda head, _: head[::-1], labels)
    summary = repair_gguf(RepairOptions(broken=wrong, output=tmp_path / "fixed.gguf"))
    assert "no and yes" in summary.changes[0]
    assert (tmp_path / "fixed.gguf").read_bytes() == (right / "f16.gguf").read_bytes()


def test_exchanged_rows_keep_their_own_precision_beside_a_packed_embedding(right, tmp_path):
    from tests.checks.rewriting import rewrite_gguf
    from tests.checks.test_gguf import exchange_rows

    wrong = rewritten(right / "q8_0.gguf", tmp_path / "wrong.gguf")
    rewrite_gguf(wrong, tensors=exchange_rows)
    repair_gguf(RepairOptions(broken=wrong, output=tmp_path / "fixed.gguf"))
    assert digest(tmp_path / "fixed.gguf") == digest(right / "q8_0.gguf")


def test_labels_alone_are_turned_where_the_rows_are_right(right, tmp_path):
    wrong = with_head(right / "f16.gguf", tmp_path / "wrong.gguf", lambda head, _: head, ["no", "yes"])
    repair_gguf(RepairOptions(broken=wrong, output=tmp_path / "fixed.gguf"))
    assert digest(tmp_path / "fixed.gguf") == digest(right / "f16.gguf")


def test_the_rows_of_other_tokens_are_replaced(right, tmp_path):
    wrong = with_head(right / "f16.gguf", tmp_path / "wrong.gguf", lambda _, table: table[[300, 301]])
    tokens = read_gguf(wrong).get("tokenizer.ggml.tokens")
    (change,) = repair_gguf(RepairOptions(broken=wrong, output=tmp_path / "fixed.gguf")).changes
    assert f"held the rows of {tokens[300]!r} and {tokens[301]!r}" in change
    assert digest(tmp_path / "fixed.gguf") == digest(right / "f16.gguf")


def test_a_trained_head_stays_and_goes_with_its_labels(right, tmp_path):
    own = with_head(right / "f16.gguf", tmp_path / "own.gguf", trained)
    with pytest.raises(UsageError, match="Nothing to repair"):
        repair_gguf(RepairOptions(broken=own, output=tmp_path / "fixed.gguf"))
    turned = with_head(own, tmp_path / "turned.gguf", lambda head, _: head[::-1], ["no", "yes"])
    repair_gguf(RepairOptions(broken=turned, output=tmp_path / "fixed.gguf"))
    assert digest(tmp_path / "fixed.gguf") == digest(own)


def test_a_trained_head_whose_labels_say_nothing_is_refused(right, tmp_path):
    wrong = with_head(right / "f16.gguf", tmp_path / "wrong.gguf", trained, ["LABEL_0", "LABEL_1"])
    with pytest.raises(ModelError, match="unknown which of them means yes"):
        repair_gguf(RepairOptions(broken=wrong, output=tmp_path / "fixed.gguf"))


def test_an_embedder_without_pooling_gets_it_when_asked(right, tmp_path):
    broken = plain(right, "f16", tmp_path / "plain.gguf")
    repair_gguf(RepairOptions(broken=broken, output=tmp_path / "fixed.gguf", task=Task.EMBED))
    fixed = read_gguf(tmp_path / "fixed.gguf")
    assert fixed.get("qwen3vl.pooling_type") == 3
    assert HEAD not in fixed.tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fields": {"general.architecture": string("llama")}},
            "has the architecture 'llama'; expected qwen3 or qwen3vl",
        ),
        ({"fields": {"split.count": Value(GGUFValueType.UINT16, 2)}}, "one of several parts"),
        ({"without": [HEAD, "token_embd.weight"]}, "which contain the rows of yes and no"),
        ({"without": [HEAD], "drop_fields": ["tokenizer.ggml.tokens"]}, "has no token 'yes'"),
    ],
)
def test_what_cannot_be_right_is_refused(change, message, right, tmp_path):
    broken = rewritten(right / "f16.gguf", tmp_path / "broken.gguf", **change)
    with pytest.raises(ModelError, match=message):
        repair_gguf(RepairOptions(broken=broken, output=tmp_path / "fixed.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_another_base_is_refused(right, tmp_path):
    broken = plain(right, "f16", tmp_path / "plain.gguf")
    other = MODELS["text-reranker-untied"](tmp_path / "other")
    with pytest.raises(ModelError, match="was not made from"):
        repair_gguf(RepairOptions(broken=broken, output=tmp_path / "fixed.gguf", base=str(other)))


def base_with(right, target, change):
    """The model that the files were made from, but for its embedding, which `change` makes another."""
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    copytree(right / "model", target)
    tensors = load_file(target / "model.safetensors")
    name = next(each for each in tensors if each.endswith("embed_tokens.weight"))
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_a_base_of_the_same_shape_with_other_rows_is_refused(outtype, right, tmp_path):
    broken = plain(right, outtype, tmp_path / "plain.gguf")
    base = base_with(right, tmp_path / "base", lambda rows: rows.roll(1, 0))
    with pytest.raises(ModelError, match=r"rows of yes and no in token_embd\.weight differ"):
        repair_gguf(RepairOptions(broken=broken, output=tmp_path / "fixed.gguf", base=base))
    assert not (tmp_path / "fixed.gguf").exists()


def test_a_base_for_another_task_is_refused(right, tmp_path):
    broken = plain(right, "q8_0", tmp_path / "plain.gguf")
    options = RepairOptions(broken=broken, output=tmp_path / "fixed.gguf", base="qtool-demo-embedder", task=Task.RERANK)
    with pytest.raises(UsageError, match=r"qtool-demo-embedder is an embedder \(modules\.json"):
        repair_gguf(options)
    with pytest.raises(UsageError, match="an embedder has no rank head"):
        repair_gguf(
            RepairOptions(broken=broken, output=tmp_path / "fixed.gguf", base="qtool-demo-reranker", task=Task.EMBED)
        )


def test_an_untied_base_gives_a_head_that_its_file_lacks(tmp_path):
    """Such a file has the embedding only, whose rows are not the head's: each is compared with its own."""
    model = MODELS["text-reranker-untied"](tmp_path / "model")
    convert_gguf(ConvertOptions(model=str(model), output=tmp_path / "right.gguf", outtypes=("f16",)))
    broken = rewritten(tmp_path / "right.gguf", tmp_path / "broken.gguf", without=[HEAD])
    repair_gguf(RepairOptions(broken=broken, output=tmp_path / "fixed.gguf", base=str(model), task=Task.RERANK))
    fixed, right = (read_gguf(tmp_path / f"{name}.gguf").tensors[HEAD] for name in ("fixed", "right"))
    assert (fixed.type.name, fixed.shape) == ("BF16", right.shape)


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        ("nope.gguf", r"No such file: nope\.gguf", "hf download"),
        ("hf://a/b/c.gguf", "needs a local file", "Download it first: hf download a/b c.gguf --local-dir ."),
        ("hf://a/b@v1/x/c.gguf", "needs a local file", "hf download a/b x/c.gguf --revision v1 --local-dir ."),
        ("https://example.org/c.gguf", "needs a local file", "hf download ORG/NAME FILE.gguf"),
    ],
)
def test_what_is_no_file_here_is_a_usage_error(path, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as refused:
        repair_gguf(RepairOptions(broken=Path(path), output=tmp_path / "fixed.gguf"))
    assert hint in refused.value.hint


def test_of_a_folder_a_file_is_proposed(right, tmp_path):
    with pytest.raises(UsageError, match="is a folder") as refused:
        repair_gguf(RepairOptions(broken=right, output=tmp_path / "fixed.gguf"))
    assert str(right / "f16.gguf") in refused.value.hint


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_a_repaired_file_scores_as_a_right_one(outtype, right, tmp_path):
    """In llama.cpp; the head of the q8_0 file comes from its packed embedding: |ΔP| measured 0 (f16) and 5.2e-4."""
    import numpy as np

    from qtool import resources
    from qtool.inputs.panels import load_panel
    from qtool.scoring.llama_cpp.runtime import open_llama_cpp

    repair_gguf(RepairOptions(broken=plain(right, outtype, tmp_path / "plain.gguf"), output=tmp_path / "fixed.gguf"))
    pairs = load_panel(resources.path("calibration/panels/demo-text.jsonl")).pairs[:28]
    scores = []
    for path in (right / f"{outtype}.gguf", tmp_path / "fixed.gguf"):
        with open_llama_cpp(path) as scorer:
            scores.append(1 / (1 + np.exp(-np.array(scorer.score(pairs)))))
    assert np.abs(scores[0] - scores[1]).max() <= {"f16": 0, "q8_0": 2e-3}[outtype]
