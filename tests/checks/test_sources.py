"""What engines read differently from one folder is found without a reference, each by its one code."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qtool.checks import loaders
from qtool.checks.inspect import inspect
from qtool.storage.checkpoint import INDEX, SINGLE
from tests.checks.conftest import edit_json
from tests.checks.rewriting import codes, rewrite_safetensors
from tests.checks.stages import check_structure
from tests.checks.test_checkpoint import EMBEDDING, config_of, configure, edit_hf_quant_config, in_text


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def copy_weights(name):
    return lambda folder: shutil.copyfile(folder / SINGLE, folder / name)


def another_head(folder):
    rewrite_safetensors(folder, lambda t: t.update({"lm_head.weight": t[f"{EMBEDDING}.weight"].flip(0).clone()}))


def two_image_processors(folder):
    own = json.loads((folder / "preprocessor_config.json").read_text()) | {"patch_size": 14}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": own}))


def two_rotary_bases(folder):
    in_text(rope_parameters={**config_of(folder)["text_config"]["rope_scaling"], "rope_theta": 5e6})(folder)


def norm_twice(folder):
    name = "model.language_model.norm.weight"
    rewrite_safetensors(folder, lambda t: t.update({name.removeprefix("model."): t[name].clone()}))


def scheme(folder):
    declared = config_of(folder)["quantization_config"]
    declared["config_groups"]["group_0"]["weights"]["num_bits"] = "4"
    edit_json(folder / "config.json", quantization_config=declared)


def declare(**changes):
    return lambda folder: edit_json(
        folder / "config.json", quantization_config=config_of(folder)["quantization_config"] | changes
    )


FOUND = {
    "safetensors-field-type": ("reranker", [in_text(hidden_size="256"), in_text(attention_bias="no")]),
    "safetensors-two-weights": ("reranker", [copy_weights("extra.safetensors"), copy_weights("model-old.safetensors")]),
    "safetensors-tensor-twice": ("reranker", [norm_twice]),
    "safetensors-unread-weights": ("reranker", [write("pytorch_model.bin", "")]),
    "safetensors-untied-head": ("reranker", [another_head]),
    "safetensors-two-sources": (
        "reranker",
        [
            two_image_processors,
            configure("tokenizer_config.json", chat_template="{{ messages }}"),
            write("chat_template.json", '{"chat_template": "{{ query }}"}'),
            in_text(tie_word_embeddings=False),
            write("vocab.json", '{"a": 1}'),
            write("merges.txt", "#version: 0.2\na b\n"),
            write("added_tokens.json", '{"<|im_end|>": 3}'),
            write("special_tokens_map.json", '{"eos_token": {"content": "<|endoftext|>"}}'),
        ],
    ),
    "safetensors-declared-type": ("reranker", [configure("config.json", dtype="float16"), in_text(dtype="float32")]),
    "safetensors-unknown-type": (
        "reranker",
        [configure("config.json", dtype="int4"), configure("config.json", dtype=4)],
    ),
    "safetensors-adapter": ("reranker", [write("adapter_config.json", "{}")]),
    "safetensors-own-code": (
        "reranker",
        [configure("preprocessor_config.json", auto_map={"AutoImageProcessor": "a.B"})],
    ),
    "safetensors-code-file": ("reranker", [write("modeling.py", "")]),
    "safetensors-template-reference": ("reranker", [write("chat_template.jinja", "{%- extends 'base.jinja' -%}")]),
    "nvfp4-declaration": ("reranker-nvfp4", [declare(quant_method="compressed-tensors")]),
    "nvfp4-scheme": ("reranker-nvfp4", [scheme, declare(config_groups=[])]),
    "nvfp4-kv-cache": ("reranker-nvfp4", [lambda folder: edit_hf_quant_config(folder, kv_cache_quant_algo="FP8")]),
}
"""By code: the checkpoint and what breaks it so."""
CODES = set(FOUND)


@pytest.mark.parametrize(
    ("code", "name", "change"), [(code, name, change) for code, (name, changes) in FOUND.items() for change in changes]
)
def test_what_engines_read_differently_is_found(code, name, change, copy_of):
    folder = copy_of(name)
    change(folder)
    assert codes(inspect(str(folder))) == [code]


def test_two_rotary_embeddings_are_two_sources(copy_of):
    folder = copy_of("reranker")
    two_rotary_bases(folder)
    assert "safetensors-two-sources" in codes(inspect(str(folder)))


def test_the_engines_that_take_other_weights_are_named(copy_of):
    folder = copy_of("reranker")
    copy_weights("extra.safetensors")(folder)
    (finding,) = inspect(str(folder)).findings
    assert finding.sentence == (
        "The folder holds two sets of weights: vLLM and SGLang load extra.safetensors and 1 more; "
        "transformers and llama.cpp's converter load model.safetensors."
    )


@pytest.mark.parametrize(
    "files", [{SINGLE}, {SINGLE, INDEX}, {INDEX, "a.safetensors"}, {"consolidated.safetensors", SINGLE}]
)
def test_the_order_of_transformers_is_that_of_its_loader(files, tmp_path):
    """The real loader is asked which files it would read."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    for name in files - {INDEX}:
        (tmp_path / name).write_bytes(b"")
    shard = "a.safetensors" if "a.safetensors" in files else SINGLE
    if INDEX in files:
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    found, _ = _get_resolved_checkpoint_files(str(tmp_path), None, None, None, None, is_remote_code=False)
    rule = next(rule for rule in loaders.WEIGHT_RULES if rule.engine == loaders.TRANSFORMERS)
    expected = loaders.weight_files(rule, loaders.FolderFiles(tmp_path, files))
    assert {path.rpartition("/")[2] for path in found} == expected


def test_transformers_unties_a_head_that_differs(copy_of):
    from transformers import AutoModelForImageTextToText

    folder = copy_of("reranker")
    another_head(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(head, embedding.flip(0))


def value_of(thing, engine, folder):
    """What the table says that `engine` takes."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    readings = [each for each in thing.read(is_vision=True) if engine in each.engines]
    return [loaders.taken(each, loaders.FolderFiles(folder, names))[1] for each in readings]


def test_the_chat_template_is_the_one_that_transformers_takes(copy_of):
    from transformers import AutoTokenizer
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    folder = copy_of("reranker")
    edit_json(folder / "tokenizer_config.json", chat_template="of the tokenizer's config")
    (folder / "chat_template.json").write_text('{"chat_template": "of chat_template.json"}')
    (folder / "processor_config.json").write_text('{"chat_template": "of the processor"}')
    taken = [
        AutoTokenizer.from_pretrained(folder).chat_template,
        Qwen3VLProcessor.get_processor_dict(folder)[0]["chat_template"],
    ]
    assert value_of(loaders.CHAT_TEMPLATE, loaders.TRANSFORMERS, folder) == taken
    (folder / "processor_config.json").unlink()
    taken[1] = Qwen3VLProcessor.get_processor_dict(folder)[0]["chat_template"]
    assert value_of(loaders.CHAT_TEMPLATE, loaders.TRANSFORMERS, folder) == taken
    (folder / "chat_template.jinja").unlink()
    taken = [AutoTokenizer.from_pretrained(folder).chat_template, "of chat_template.json"]
    assert value_of(loaders.CHAT_TEMPLATE, loaders.TRANSFORMERS, folder) == taken


def test_the_image_processor_is_the_one_that_transformers_takes(copy_of):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = copy_of("reranker")
    for _ in range(2):
        taken, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(str(folder))
        assert value_of(loaders.IMAGE_PROCESSOR_FILE, loaders.VLLM, folder) == [taken]
        two_image_processors(folder)


def test_a_fault_of_the_reference_too_is_none_of_the_artefact(copy_of, made, tmp_path):
    reference = shutil.copytree(made("reranker"), tmp_path / "reference")
    artefact = copy_of("reranker")
    for folder in (reference, artefact):
        configure("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]})(folder)
        write("tokenization.py", "")(folder)
    assert [each.code for each in check_structure(artefact, reference).findings] == []
    (reference / "tokenization.py").unlink()
    assert [each.code for each in check_structure(artefact, reference).findings] == ["safetensors-code-file"]
