"""The table of config fields is that of transformers: the same defaults, and every field of its classes is known."""

from __future__ import annotations

import pytest

from qtool.arch import config_fields
from qtool.arch.config_fields import DECODER, ELSEWHERE, TOP, UNREAD, VISION, ConfigField


def classes():
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3_vl import configuration_qwen3_vl as vision

    return (
        (Qwen3Config, {**TOP, **DECODER}),
        (vision.Qwen3VLTextConfig, DECODER),
        (vision.Qwen3VLVisionConfig, VISION),
        (vision.Qwen3VLConfig, TOP),
    )


@pytest.mark.parametrize("index", range(4))
def test_every_field_of_transformers_is_known_with_its_default(index):
    config_class, fields = classes()[index]
    names = [name for name in vars(config_class).get("__annotations__", {}) if not name.startswith("_")]
    assert [name for name in names if name not in {*fields, *ELSEWHERE, *UNREAD}] == []
    for name in names:
        if name in fields and fields[name].default is not None:
            assert fields[name].default == getattr(config_class(), name), name


def test_the_processors_take_the_same_defaults():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    for name, default in config_fields.IMAGE_PROCESSOR.items():
        assert getattr(Qwen2VLImageProcessorPil, name) == default, name


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (config_fields.COUNT, [1, None], [0, True, "1", 1.0, [1]]),
        (config_fields.ID, [0, 7], [-1, "7", 0.5]),
        (config_fields.NUMBER, [1, 1.5, 1e-6], ["1e-6", float("nan"), float("inf"), 10**400, True]),
        (config_fields.FLAG, [True, False], [0, "no"]),
        (config_fields.WORDS, [[], ["a"]], ["a", [1]]),
        (config_fields.LAYERS, [[0, 1]], [3, ["0"], [True]]),
        (config_fields.IDS, [1, [1, 2]], ["1", [1, "2"], {}]),
    ],
)
def test_a_value_of_the_wrong_kind_is_not_accepted(kind, good, bad):
    assert all(ConfigField(kind).accepts(value) for value in good)
    assert not any(ConfigField(kind).accepts(value) for value in bad)
