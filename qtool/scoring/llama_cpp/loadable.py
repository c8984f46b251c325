"""What llama.cpp must not be handed: files with which it ends the whole process, and this one with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qtool.arch.family import Family
from qtool.arch.gguf_names import PATCH_EMBEDDINGS
from qtool.errors import ModelError
from qtool.storage.gguf_fields import LoadProblem, language_problems, projector_problems
from qtool.storage.gguf_model import PROJECTOR, GgufModel

Shape = tuple[int, ...]

_VISION: Final = f"{PROJECTOR}.vision."
VISION_SIZES: Final = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "depth",
    "patch_size": "patch_size",
    "projection_dim": "out_hidden_size",
}
"""The sizes of a vision tower: llama.cpp's names and those of config.json."""


def require_loadable(model: GgufModel, family: Family) -> None:
    """Raise ModelError for a language model with which llama.cpp would end this process, or which it refuses."""
    problems = language_problems(model, has_sections=family.is_vision)
    _refuse(model, problems, "Convert the model again: qtool convert-gguf MODEL -o OUT")
    if model.flag(model.key("attention.causal")) is False:
        raise ModelError(
            f"{model.target} declares attention that is not causal, with which llama.cpp ends the whole process for a "
            "long prompt and scores others wrongly.",
            "Convert the model again: qtool convert-gguf MODEL -o OUT",
        )


def require_projector(projector: GgufModel, family: Family) -> None:
    """Likewise of a vision projector, whose tensors llama.cpp does not check."""
    hint = "Pass the projector that was converted with this model."
    _refuse(projector, projector_problems(projector), hint)
    sizes = [_VISION + field for field in (*VISION_SIZES, "image_size") if (vision_size(projector, field) or 0) < 1]
    if sizes:
        raise ModelError(f"llama.cpp cannot use {projector.target}: it lacks {sizes[0]}.", hint)
    for name, shape in expected_tensors(projector, family).items():
        found = projector.tensors.get(name)
        if found is None or found.shape != shape:
            what = "is missing" if found is None else f"has the shape {list(found.shape)}, expected {list(shape)}"
            raise ModelError(f"llama.cpp would end the whole process: {name} of {projector.target} {what}.", hint)


def _refuse(model: GgufModel, problems: Iterator[LoadProblem], hint: str) -> None:
    for problem in problems:
        raise ModelError(f"llama.cpp {problem.effect} {model.target}: {problem.what}.", hint)


def vision_size(projector: GgufModel, field: str) -> int | None:
    """One of the sizes that a projector declares."""
    return projector.integer(_VISION + field)


def deepstack_layers(projector: GgufModel) -> list[int]:
    """The vision layers that have a deepstack merger."""
    names = (name.split(".") for name in projector.tensors if name.startswith("v.deepstack."))
    return sorted({int(parts[2]) for parts in names if len(parts) > 3 and parts[2].isdecimal()})


def expected_tensors(projector: GgufModel, family: Family) -> Mapping[str, Shape]:
    """The tensors that a projector must have by its own fields, all of which are at least 1."""
    if family.vision is None:
        return {}
    layers = deepstack_layers(projector)
    config: dict[str, Any] = {hf_field: vision_size(projector, field) for field, hf_field in VISION_SIZES.items()}
    merge = vision_size(projector, "spatial_merge_size") or 0
    config |= {
        "depth": min(config["depth"], len(projector.tensors) + 1),
        "num_position_embeddings": ((vision_size(projector, "image_size") or 0) // config["patch_size"]) ** 2 or 1,
        "deepstack_visual_indexes": layers,
        **({"spatial_merge_size": merge} if merge > 0 else {}),
    }
    expected: dict[str, Shape] = {}
    for spec in family.vision.tensors(config):
        if spec.hf_name == family.vision.patch_embedding:  # a convolution over two frames, one tensor each
            expected |= dict.fromkeys(PATCH_EMBEDDINGS, (*spec.shape[:2], *spec.shape[3:]))
        else:
            expected[str(family.gguf_names.of(spec.hf_name, layers))] = spec.shape
    return expected
