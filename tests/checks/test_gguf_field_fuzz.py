"""Any value of any type in any field of a GGUF file ends in findings or in an error of qtool's."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

import pytest
from gguf.constants import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.checks.inspect import inspect
from qtool.errors import QtoolError
from qtool.scoring.llama_cpp.loadable import require_projector
from qtool.scoring.llama_cpp.model import read_model
from qtool.storage.gguf import CODES, Value, read_gguf
from qtool.storage.gguf_fields import DECODER, PROJECTOR_FIELDS, TOKENIZER
from qtool.storage.gguf_model import open_gguf_file
from tests.checks.rewriting import rewrite_gguf
from tests.checks.stages import check_structure, compare_weights, rederive

EXAMPLES = int(os.environ.get("QTOOL_FUZZ_EXAMPLES", "24"))
TEXTS = st.sampled_from(["", "x", "clip", "qwen3", "gpt2", "{query}{document}", "\0", "é" * 50, "\udcff"])
RANGES = {
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.FLOAT32: st.floats(width=32),
    GGUFValueType.FLOAT64: st.floats(),
    GGUFValueType.STRING: TEXTS,
}
BITS = {"B": 8, "H": 16, "I": 32, "Q": 64}


def numbers(kind):
    """All that fits into a type of whole numbers, small ones more often."""
    code = CODES[kind]
    bits = BITS[code.upper()]
    low, high = (0, (1 << bits) - 1) if code.isupper() else (-(1 << bits - 1), (1 << bits - 1) - 1)
    return st.one_of(st.integers(max(low, -3), 5), st.integers(low, high))


@st.composite
def values(draw):
    kind = draw(st.sampled_from([each for each in GGUFValueType if each is not GGUFValueType.ARRAY]))
    element = RANGES[kind] if kind in RANGES else numbers(kind)
    is_list = draw(st.booleans())
    return Value(kind, draw(st.lists(element, max_size=5) if is_list else element), is_list)


LANGUAGE_KEYS = [f"qwen3vl.{name}" for name in DECODER] + list(TOKENIZER) + [
    "general.architecture", "general.type", "general.name", "general.file_type", "split.count", "split.no",
    "split.tensors.count", "tokenizer.chat_template", "tokenizer.chat_template.rerank", "tokenizer.chat_templates",
    "tokenizer.ggml.scores",
]  # fmt: skip
KEYS = [("model.gguf", key) for key in LANGUAGE_KEYS]
KEYS += [("mmproj.gguf", key) for key in (*PROJECTOR_FIELDS, "clip.vision.is_deepstack_layers", "general.architecture")]


@pytest.fixture(scope="module")
def good(builder):
    return builder.good("reranker/gguf-f16")


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(KEYS), value=st.one_of(st.none(), values()))
def test_a_field_may_be_anything(place, value, good, builder, tmp_path):
    file, key = place
    folder = tmp_path / "artefact"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    rewrite_gguf(
        folder / file, lambda metadata: metadata.pop(key, None) if value is None else metadata.update({key: value})
    )
    reference = builder.reference("reranker")
    for step in (
        lambda: inspect(str(folder)),
        lambda: check_structure(folder, reference),
        lambda: compare_weights(folder, reference),
        lambda: require_projector(open_gguf_file(folder / "mmproj.gguf"), read_model(folder / "model.gguf").family),
    ):
        with suppress(QtoolError):
            step()


@settings(max_examples=EXAMPLES // 4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_rederiving_survives_any_field(seed, good, builder, tmp_path):
    folder = tmp_path / "artefact"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    keys = list(read_gguf(folder / "model.gguf").metadata)
    key = keys[seed % len(keys)]
    kinds = [Value(GGUFValueType.UINT8, 3), Value(GGUFValueType.STRING, "x"), Value(GGUFValueType.INT32, [1], True)]
    rewrite_gguf(folder / "model.gguf", lambda metadata: metadata.update({key: kinds[seed % 3]}))
    with suppress(QtoolError):
        rederive(folder, builder.reference("reranker"), tmp_path)
    shutil.rmtree(tmp_path / "converted", ignore_errors=True)
