"""Whatever stands in a folder's JSON files, structure and inspection answer with findings or a QtoolError.

`make fuzz` runs many thousands of cases; the suite one hundred.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.checks import structure_tokenizer
from qtool.checks.inspect import inspect
from qtool.errors import ModelError, QtoolError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.export.quantize import QuantizeOptions, quantize
from qtool.scoring.tokenizer import PromptTokenizer
from tests.checks.stages import check_structure
from tests.fuzzing import changed_text

EXAMPLES = int(os.environ.get("QTOOL_FUZZ_EXAMPLES", "100"))
NAMES = (
    "config.json", "config.json", "config.json", "tokenizer_config.json", "tokenizer_config.json", "tokenizer.json",
    "hf_quant_config.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "1_LogitScore/config.json", "generation_config.json",
    "qtool.json", "processor_config.json", "chat_template.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "model.safetensors.index.json",
)  # fmt: skip
NEW_FIELDS = (
    "auto_map", "chat_template", "added_tokens_decoder", "transformers_weights", "layer_types", "rope_parameters",
    "rope_scaling", "dtype", "compression_config", "kv_cache_scheme", "image_processor", "weight_map", "model_max_length",
    "extra_special_tokens", "size", "min_pixels", "eos_token",
)  # fmt: skip
VALUES = (
    "7", "x", "", None, True, False, 0, -1, 1.5, 1e308, 10**400, float("nan"), float("inf"), [], [1], ["a", None], {},
    {"a": 1}, {"a": {"b": []}}, [[[]]], "\ud800", "a" * 3000, [{}], "\x1b[31m", 2**63,
)  # fmt: skip
BYTES = (b"", b"\xff\xfe", b"{", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b"null", b'"\xed\xa0\x80"')


@pytest.fixture(scope="module")
def case(builder, tmp_path_factory):
    """A folder to break, its unbroken files, and its reference; transformers is left out, which the corpus tries."""
    folder = tmp_path_factory.mktemp("fuzz") / "artefact"
    shutil.copytree(builder.good("reranker/nvfp4"), folder)
    files = {name: (folder / name).read_bytes() if (folder / name).exists() else b"{}" for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure_tokenizer, "_by_ids", lambda *_: ())
        yield folder, files, builder.reference("reranker")


@pytest.fixture(scope="module")
def planned(builder, tmp_path_factory):
    """A reference to break, and its unbroken files."""
    folder = tmp_path_factory.mktemp("planned") / "model"
    shutil.copytree(builder.reference("reranker"), folder)
    return folder, {name: (folder / name).read_bytes() if (folder / name).exists() else b"{}" for name in NAMES}


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_anywhere_is_answered_or_refused(case, data):
    folder, files, reference = case
    name = data.draw(st.sampled_from(NAMES))
    existed = (folder / name).exists()
    (folder / name).write_bytes(broken(files[name], data.draw))
    try:
        for job in (
            lambda: check_structure(folder, reference).findings,
            lambda: inspect(str(folder)).to_dict(),
            lambda: PromptTokenizer.read(folder).encode("a <|im_start|> b"),
        ):
            with contextlib.suppress(QtoolError):
                job()
    finally:
        (folder / name).write_bytes(files[name])
        if not existed:
            (folder / name).unlink()


@settings(max_examples=max(EXAMPLES // 2, 50), suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data(), seed=st.integers(0, 1 << 48))
def test_any_reference_is_planned_or_refused(planned, data, seed):
    """What `quantize` and `convert-gguf` read of a folder: in words, and soon, whatever numbers it claims."""
    folder, files = planned
    name = data.draw(st.sampled_from(NAMES))
    existed = (folder / name).exists()
    is_changed = data.draw(st.booleans())
    content = changed_text(json.loads(files[name]), seed) if is_changed else broken(files[name], data.draw)
    (folder / name).write_bytes(content)
    try:
        for job in (
            lambda: convert_gguf(ConvertOptions(model=str(folder), outtypes=("q8_0",), dry_run=True)),
            lambda: quantize(QuantizeOptions(model=str(folder), dry_run=True)),
        ):
            began = time.perf_counter()
            message = ""
            try:
                job()
            except QtoolError as error:
                message = error.message
            assert " is None" not in message
            assert time.perf_counter() - began < 5
    finally:
        (folder / name).write_bytes(files[name])
        if not existed:
            (folder / name).unlink()


def test_a_folder_that_claims_a_billion_layers_is_refused_soon(planned):
    folder, files = planned
    for section, field in (("text_config", "num_hidden_layers"), ("vision_config", "depth")):
        config = json.loads(files["config.json"])
        config[section][field] = 10**9
        (folder / "config.json").write_text(json.dumps(config))
        began = time.perf_counter()
        for job in (
            lambda: convert_gguf(ConvertOptions(model=str(folder), dry_run=True)),
            lambda: quantize(QuantizeOptions(model=str(folder), dry_run=True)),
        ):
            with pytest.raises(QtoolError):
                job()
        assert time.perf_counter() - began < 5
    (folder / "config.json").write_bytes(files["config.json"])


def test_a_number_that_no_field_holds_is_refused(planned):
    folder, files = planned
    config = json.loads(files["config.json"])
    config["text_config"]["max_position_embeddings"] = 10**12
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not fit"):
        convert_gguf(ConvertOptions(model=str(folder), dry_run=True))
    (folder / "config.json").write_bytes(files["config.json"])


def broken(content, draw):
    """A file with one value replaced, dropped or added, or with bytes that are no JSON."""
    kind = draw(st.sampled_from(("replace", "replace", "replace", "drop", "add", "bytes")))
    if kind == "bytes":
        return draw(st.sampled_from(BYTES))
    value = json.loads(content)
    holder, key = {"": value}, ""
    while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 4)):
        holder = holder[key]
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    if kind == "drop" and key != "":
        del holder[key]
    elif kind == "add" and isinstance(holder[key], dict):
        holder[key][draw(st.sampled_from(NEW_FIELDS))] = draw(st.sampled_from(VALUES))
    elif key == "":
        value = draw(st.sampled_from(VALUES))
    else:
        holder[key] = draw(st.sampled_from(VALUES))
    return json.dumps(value).encode()
