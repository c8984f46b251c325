"""A checkpoint in ModelOpt's NVFP4 layout: its scales, what it declares, and what it leaves unquantized.

Rule: a finding here is something that vLLM or SGLang loads without complaint and then scores wrong with, or refuses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, Final

from qtool.checkpoint.reader import TensorInfo
from qtool.formats.nvfp4 import BLOCK
from qtool.inspection.catalogue import listed_are
from qtool.inspection.checkpoint_model import BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE, CheckpointModel, as_mapping
from qtool.inspection.finding import Finding
from qtool.inspection.place import Place
from qtool.jsonfile import read_json

METHOD: Final = "modelopt"
ALGORITHMS: Final = ("W4A16_NVFP4", "NVFP4")
HF_QUANT_CONFIG: Final = "hf_quant_config.json"


def declared(model: CheckpointModel) -> Mapping[str, Any]:
    """config.json's quantization_config; empty where there is none."""
    return as_mapping(model.detection.config.get("quantization_config"))


def excluded(model: CheckpointModel) -> list[str]:
    """The patterns of the modules that stay unquantized, from config.json or else from hf_quant_config.json."""
    stated = declared(model)
    if stated or HF_QUANT_CONFIG not in model.names:
        return _patterns(stated, "ignore")
    return _patterns(_hf_quant_config(model), "exclude_modules")


def quantization_findings(place: Place, model: CheckpointModel) -> Iterator[Finding]:
    """Everything that keeps the packed weights from being read as they were meant."""
    yield from _declaration_findings(model)
    yield from _module_findings(model)
    yield from _excluded_findings(model)
    problems = list(_scale_findings(model))
    yield from problems
    if not problems:
        yield from _value_findings(place, model)


def _declaration_findings(model: CheckpointModel) -> Iterator[Finding]:
    stated = declared(model)
    if not stated:
        yield model.found("nvfp4-no-quantization-config")
    if stated.get("quant_algo") == ALGORITHMS[1] or any(n.endswith(INPUT_SCALE) for n in model.companions):
        yield model.found("nvfp4-activations", algorithm=stated.get("quant_algo"))
    if HF_QUANT_CONFIG not in model.names:
        yield model.found("nvfp4-no-hf-quant-config")
        return
    other = _hf_quant_config(model)
    sizes = {str(size) for size in (other.get("group_size"), _group_size(stated)) if size not in (None, BLOCK)}
    if sizes:
        yield model.found("nvfp4-group-size", found=min(sizes))
    if stated:
        same = {"quant_algo": stated.get("quant_algo"), "exclude_modules": sorted(_patterns(stated, "ignore"))}
        for field, value in same.items():
            found = sorted(_patterns(other, field)) if isinstance(value, list) else other.get(field)
            if found != value:
                yield model.found("nvfp4-config-mismatch", field=field)


def _hf_quant_config(model: CheckpointModel) -> Mapping[str, Any]:
    return as_mapping(read_json(model.checkpoint.directory / HF_QUANT_CONFIG).get("quantization"))


def _group_size(stated: Mapping[str, Any]) -> Any:
    try:
        return stated["config_groups"]["group_0"]["weights"]["group_size"]
    except (KeyError, TypeError):
        return None


def _patterns(stated: Mapping[str, Any], field: str) -> list[str]:
    found = stated.get(field)
    return list(map(str, found)) if isinstance(found, list) else []


def _module_findings(model: CheckpointModel) -> Iterator[Finding]:
    for name in model.packed:
        if not model.specs[name].fused_group:
            yield model.found("nvfp4-quantized-head", module=model.specs[name].module)
            break
    for group, members in _groups(model).items():
        if 0 < sum(name in model.packed for name in members) < len(members):
            yield model.found("nvfp4-partial-group", group=group)
            break


def _groups(model: CheckpointModel) -> Mapping[str, Sequence[str]]:
    groups: dict[str, list[str]] = {}
    for name, spec in model.specs.items():
        if spec.fused_group:
            groups.setdefault(spec.fused_group, []).append(name)
    return groups


def _excluded_findings(model: CheckpointModel) -> Iterator[Finding]:
    patterns = excluded(model)
    for needed in model.detection.architecture.unquantized:
        if needed.endswith("*") and needed not in patterns:
            yield model.found("excluded-modules-pattern", expected=needed)
    plain = [n for n in model.weights if n not in model.packed and _engines_expect_packed(model, n)]
    exposed = [model.specs[name].module for name in plain if not _is_excluded(model.specs[name].module, patterns)]
    if exposed:
        yield model.found("excluded-modules-missing", modules=listed_are(exposed))
    hidden = [model.specs[n].module for n in model.packed if _is_excluded(model.specs[n].module, patterns)]
    if hidden:
        yield model.found("excluded-modules-packed", modules=listed_are(hidden))


def _engines_expect_packed(model: CheckpointModel, hf_name: str) -> bool:
    """Whether an engine that is told nothing takes the module for a quantized one: linears and the head."""
    return bool(model.specs[hf_name].fused_group) or model.specs[hf_name].module == model.detection.architecture.head


def _is_excluded(module: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(module, pattern) or module.startswith(f"{pattern}.") for pattern in patterns)


def _scale_findings(model: CheckpointModel) -> Iterator[Finding]:
    expected = {scale: shape for name in model.packed for scale, shape in _scales_of(model, name).items()}
    missing = [name for name in expected if name not in model.companions]
    if missing:
        yield model.found("nvfp4-missing-scale", tensors=listed_are(missing))
    present = {name: model.companions[name] for name in expected if name in model.companions}
    for name, info in present.items():
        dtype = "F32" if name.endswith(GLOBAL_SCALE) else "F8_E4M3"
        if info.dtype != dtype:
            yield model.found("nvfp4-scale-type", tensor=name, found=info.dtype, expected=dtype)
            return
        if info.shape != expected[name]:
            found, needed = list(info.shape), list(expected[name])
            yield model.found("nvfp4-scale-shape", tensor=name, found=found, expected=needed)
            return


def _scales_of(model: CheckpointModel, hf_name: str) -> Mapping[str, tuple[int, ...]]:
    """The two scales of a packed weight and their shapes."""
    module, shape = model.specs[hf_name].module, model.specs[hf_name].shape
    return {module + BLOCK_SCALE: (*shape[:-1], shape[-1] // BLOCK), module + GLOBAL_SCALE: ()}


def _value_findings(place: Place, model: CheckpointModel) -> Iterator[Finding]:
    values = _global_scales(place, model)
    if values is None:
        yield model.found("nvfp4-scales-unread")
        return
    for name, value in values.items():
        if not isfinite(value) or value <= 0:
            yield model.found("nvfp4-bad-scale", tensor=name, value=value)
            return
    for group, members in _groups(model).items():
        scales = [model.specs[name].module + GLOBAL_SCALE for name in members]
        if len({values[scale] for scale in scales if scale in values}) > 1:
            yield model.found("nvfp4-unequal-scales", group=group)
            return


def _global_scales(place: Place, model: CheckpointModel) -> dict[str, float] | None:
    """Every global scale by name; None where the hub would be asked too often."""
    by_file: dict[str, list[tuple[str, TensorInfo]]] = {}
    for name, info in model.companions.items():
        if name.endswith(GLOBAL_SCALE):
            by_file.setdefault(info.file.name, []).append((name, info))
    values: dict[str, float] = {}
    for file, scales in by_file.items():
        data = place.read_spans(file, [(info.offset, info.nbytes) for _, info in scales])
        if data is None:
            return None
        values |= {name: struct.unpack("<f", raw)[0] for (name, _), raw in zip(scales, data, strict=True)}
    return values
