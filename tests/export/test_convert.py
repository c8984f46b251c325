"""Conversion against llama.cpp's own converter, and what a user sees of it."""

from __future__ import annotations

import hashlib
import json

import pytest

from qtool.arch.prompts import TEXT_RERANKER, VL_RERANKER
from qtool.arch.spec import Task
from qtool.errors import ModelError, QtoolError, UsageError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.export.quantize import QuantizeOptions, quantize
from qtool.storage.gguf import read_gguf
from qtool.storage.gguf_model import RERANK_KEY
from tests.export.digests import STORED, TYPES, digest
from tests.export.models import MODELS, RERANKERS, WITH_PICTURES

PROVENANCE = {"general.name", "general.license", "general.tags", "general.languages"}
"""Upstream guesses these from the README and the folder's name."""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Every model, made once."""
    folder = tmp_path_factory.mktemp("models")
    return {name: make(folder / name) for name, make in MODELS.items()}


def convert(model, output, *outtypes, **options):
    return convert_gguf(ConvertOptions(model=str(model), output=output, outtypes=outtypes or ("auto",), **options))


def the_file(folder, role="model"):
    (path,) = (p for p in folder.glob("*.gguf") if p.name.startswith("mmproj-") == (role == "mmproj"))
    return path


def differences(ours, theirs):
    """Names of tensors and metadata fields that are not the same in both."""
    return {
        name
        for part in ("tensors", "metadata")
        for name in ours[part].keys() | theirs[part].keys()
        if ours[part].get(name) != theirs[part].get(name)
    } - PROVENANCE


@pytest.mark.parametrize("outtype", TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_and_field_is_upstreams(name, outtype, models, tmp_path):
    upstream = json.loads(STORED.read_text())
    convert(models[name], tmp_path / "out", outtype, mmproj=outtype, prompt="llamacpp")
    expected = set()
    if outtype == "q8_0" and name in RERANKERS:
        expected = {"cls.output.weight"}  # upstream packs the two rows that every score hangs on
    for role in ("model", "mmproj") if name in WITH_PICTURES else ("model",):
        ours = digest(the_file(tmp_path / "out", role))
        assert differences(ours, upstream[f"{name} {outtype} {role}"]) == (expected if role == "model" else set())


@pytest.mark.parametrize("name", RERANKERS)
def test_the_official_prompt_of_the_family_is_baked(name, models, tmp_path):
    convert(models[name], tmp_path / "out", mmproj="none")
    prompt = VL_RERANKER if name in WITH_PICTURES else TEXT_RERANKER
    template = read_gguf(the_file(tmp_path / "out")).get(RERANK_KEY)
    assert template == prompt.template.replace("{instruction}", prompt.default_instruction)


def test_an_instruction_is_baked(models, tmp_path):
    convert(models["demo-reranker"], tmp_path / "out", mmproj="none", instruction="Find the colour.")
    assert "<Instruct>: Find the colour.<Query>:{query}\n" in read_gguf(the_file(tmp_path / "out")).get(RERANK_KEY)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_the_rank_head_is_never_quantized(outtype, models, tmp_path):
    convert(models["text-reranker-untied"], tmp_path / "out", outtype)
    assert read_gguf(the_file(tmp_path / "out")).tensors["cls.output.weight"].type.name in ("F32", "F16", "BF16")


def test_nvfp4_is_repacked_without_loss(models, tmp_path):
    """Every weight, decoded from the GGUF file by gguf-py, is the weight of the NVFP4 checkpoint."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    from qtool.arch.qwen3_vl import QWEN3_VL
    from qtool.formats.nvfp4_kernels import dequantize as from_modelopt
    from qtool.storage.checkpoint import open_checkpoint
    from qtool.storage.packed import packed_weights, read_global_scale

    quantize(QuantizeOptions(model=str(models["demo-reranker"]), output=tmp_path / "nvfp4"))
    convert(tmp_path / "nvfp4", tmp_path / "out", mmproj="none")
    path = the_file(tmp_path / "out")
    gguf, data = read_gguf(path), path.read_bytes()
    checkpoint = open_checkpoint(tmp_path / "nvfp4")
    packed = packed_weights(checkpoint)
    assert packed
    for hf_name, weight in packed.items():
        name = QWEN3_VL.gguf_names.of(hf_name)
        tensor, scale = gguf.tensors[name], gguf.tensors[name.replace(".weight", ".scale")]
        assert tensor.type.name == "NVFP4"
        raw = np.frombuffer(data[tensor.offset : tensor.offset + tensor.nbytes], np.uint8)
        factor = np.frombuffer(data[scale.offset : scale.offset + 4], "<f4")[0]
        assert factor == read_global_scale(checkpoint, weight)
        theirs = dequantize(raw.reshape(tensor.shape[0], -1), GGMLQuantizationType.NVFP4)
        ours = from_modelopt(checkpoint.read(hf_name), checkpoint.read(weight.block_scales.hf_name), np.float32(1))
        assert np.array_equal(theirs, ours)
    assert gguf.get("general.tensor_extra.prec_a4") == [False] * len(packed)


def test_a_dry_run_tells_every_byte(models, tmp_path):
    options = {"mmproj": "q8_0", "split_max_bytes": 1 << 20}
    planned = convert(models["demo-reranker"], tmp_path / "out", "f16", "q8_0", dry_run=True, **options)
    assert not (tmp_path / "out").exists()
    convert(models["demo-reranker"], tmp_path / "out", "f16", "q8_0", **options)
    assert {file.name: file.nbytes for file in planned.files} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.gguf")
    }
    assert len(planned.files) > 3


def test_parts_together_hold_what_one_file_holds(models, tmp_path):
    convert(models["demo-reranker"], tmp_path / "whole", "f16", mmproj="none")
    convert(models["demo-reranker"], tmp_path / "parts", "f16", mmproj="none", split_max_bytes=1 << 20)
    whole = digest(the_file(tmp_path / "whole"))
    parts = [digest(path) for path in sorted((tmp_path / "parts").glob("*.gguf"))]
    assert whole["tensors"] == {name: each for part in parts for name, each in part["tensors"].items()}
    assert whole["metadata"].items() <= parts[0]["metadata"].items()
    names = sorted(path.name for path in (tmp_path / "parts").glob("*.gguf"))
    assert names[0].endswith(f"-00001-of-{len(parts):05}.gguf")


def test_the_manifest_holds_the_hash_of_every_tensor(models, tmp_path):
    convert(models["demo-embedder"], tmp_path / "out", "q8_0", mmproj="none")
    path = the_file(tmp_path / "out")
    (file,) = json.loads((tmp_path / "out" / "qtool.json").read_text())["files"]
    hashes = dict(file["sha256"])
    gguf = read_gguf(path)
    header = path.read_bytes()[: gguf.data_start]
    assert hashes.pop(f"header of {path.name}") == hashlib.sha256(header).hexdigest()
    assert hashes == {name: entry[2] for name, entry in digest(path)["tensors"].items()}


def test_one_file_gets_its_own_name_and_its_manifest(models, tmp_path):
    convert(models["demo-reranker"], tmp_path / "mine.gguf", "q8_0")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mine.gguf", "mmproj-mine.gguf", "mine.gguf.qtool.json"}
    with pytest.raises(UsageError, match="exists"):
        convert(models["demo-reranker"], tmp_path / "mine.gguf", "q8_0")
    convert(models["demo-reranker"], tmp_path / "mine.gguf", "f16", force=True)
    assert read_gguf(tmp_path / "mine.gguf").get("general.file_type") == 1


def test_names_are_those_that_llama_server_looks_for(models, tmp_path):
    import shutil

    shutil.copytree(models["demo-reranker"], tmp_path / "Qwen3-VL-Reranker-2B")
    convert(tmp_path / "Qwen3-VL-Reranker-2B", tmp_path / "out", "q8_0")
    names = {path.name for path in (tmp_path / "out").glob("*.gguf")}
    assert names == {"Qwen3-VL-Reranker-2B-Q8_0.gguf", "mmproj-Qwen3-VL-Reranker-2B-F16.gguf"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outtypes": ("q3",)}, "Unknown --outtype"),
        ({"mmproj": "q4"}, "Unknown --mmproj"),
        ({"outtypes": ("nvfp4",)}, "is not quantized"),
        ({"instruction": "like {query}"}, "would replace"),
        ({"outtypes": ("f16", "q8_0"), "output": "one.gguf"}, "several --outtype need a folder"),
        ({"imatrix": "x.gguf"}, "applies to K- and I-quants"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, models, tmp_path):
    output = tmp_path / options.pop("output", "out")
    with pytest.raises(UsageError, match=message):
        convert_gguf(ConvertOptions(model=str(models["text-reranker-untied"]), output=output, **options))
    assert list(tmp_path.iterdir()) == []


def test_an_instruction_for_an_embedder_is_refused(models, tmp_path):
    with pytest.raises(UsageError, match="with each request"):
        convert(models["demo-embedder"], tmp_path / "out", instruction="x")


@pytest.mark.parametrize(("name", "warnings"), [("demo-reranker", 1), ("text-reranker-untied", 0)])
def test_what_llama_cpp_gets_wrong_is_said(name, warnings, models, tmp_path):
    quantize(QuantizeOptions(model=str(models[name]), output=tmp_path / "nvfp4"))
    assert len(convert(tmp_path / "nvfp4", tmp_path / "out", dry_run=True).warnings) == warnings


def test_an_nvfp4_checkpoint_becomes_nvfp4_or_nothing(models, tmp_path):
    quantize(QuantizeOptions(model=str(models["text-reranker-untied"]), output=tmp_path / "nvfp4"))
    with pytest.raises(UsageError, match="larger without better scores"):
        convert(tmp_path / "nvfp4", tmp_path / "out", "q8_0")


def _edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _without_yes(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"yes":', '"yess":'))


def _other_split(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("(?i:'s|'t", "(?i:'t|'s"))


def _no_task(folder):
    (folder / "modules.json").unlink()


def _scaled_rope(folder):
    _edit_json(folder / "config.json", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6})


def _not_causal(folder):
    _edit_json(folder / "config.json", is_causal=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_yes, "has no token 'yes'"),
        (_other_split, "is not qwen2"),
        (_no_task, "whether it is a reranker or an embedder"),
        (_scaled_rope, "rotary embedding is 'yarn'"),
        (_not_causal, "is_causal is false"),
    ],
)
def test_what_a_gguf_file_cannot_say_is_refused(damage, message, tmp_path):
    model = MODELS["text-reranker-untied"](tmp_path / "model")
    damage(model)
    with pytest.raises(QtoolError, match=message):
        convert(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_beyond_f16_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    model = MODELS["text-reranker-untied"](tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds weights beyond 65,504"):
        convert(model, tmp_path / "out", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    convert(model, tmp_path / "out", "bf16")


def test_an_embedder_without_a_head_converts(tmp_path):
    """As Qwen3-VL-Embedding-8B is: untied, and lm_head.weight is not there."""
    from safetensors.torch import load_file, save_file

    model = MODELS["text-embedder-appends"](tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors")
    convert(model, tmp_path / "out")
    assert "output.weight" not in read_gguf(the_file(tmp_path / "out")).tensors
    with pytest.raises(ModelError, match="cannot rank"):
        convert(model, tmp_path / "out2", task=Task.RERANK)
