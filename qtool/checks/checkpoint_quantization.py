"""A checkpoint in ModelOpt's NVFP4 layout: its scales, what it declares, and what it leaves unquantized.

A finding here is something that vLLM or SGLang loads without complaint and then scores wrong with, or refuses.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, Final

from qtool.checks.checkpoint_model import CheckpointModel, as_mapping
from qtool.checks.findings import Finding, listed_are
from qtool.formats.floats import FLOAT_FORMATS
from qtool.formats.nvfp4 import BLOCK
from qtool.jsonfile import read_json
from qtool.storage.checkpoint import Checkpoint, TensorInfo
from qtool.storage.packed import BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE, PACKED, WEIGHT

METHODS: Final = ("modelopt", "modelopt_fp4")
ALGORITHMS: Final = ("W4A16_NVFP4", "NVFP4")
HF_QUANT_CONFIG: Final = "hf_quant_config.json"
_SCHEME: Final = {"num_bits": 4, "type": "float"}
_KV_SCALES: Final = (".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale")


def foreign_quantization(checkpoint: Checkpoint) -> str:
    """The quantization that qtool does not read, for people; empty of a checkpoint whose quantization can be judged.

    Weights that are not quantized, or lie as ModelOpt's NVFP4, can be judged whatever config.json declares of them.
    """
    stated = _anywhere(checkpoint.config)
    if stated is None or _is_known(stated) or _is_plain(checkpoint) or _is_modelopt(checkpoint):
        return ""
    return _described(stated)


def _anywhere(config: Mapping[str, Any]) -> Any:
    """What config.json declares in the first of the places where engines look for it; None where it does not."""
    text = as_mapping(config.get("text_config"))
    places = (
        config.get("quantization_config"),
        text.get("quantization_config"),
        config.get("compression_config"),
    )
    return next((each for each in places if each is not None), None)


def _is_known(stated: Any) -> bool:
    stated = as_mapping(stated)
    return stated.get("quant_method") in METHODS and stated.get("quant_algo") in ALGORITHMS


def _is_plain(checkpoint: Checkpoint) -> bool:
    return all(info.dtype in FLOAT_FORMATS for info in checkpoint.tensors.values())


def _is_modelopt(checkpoint: Checkpoint) -> bool:
    packed = [name for name, info in checkpoint.tensors.items() if info.dtype == PACKED and name.endswith(WEIGHT)]
    return any(name.removesuffix(WEIGHT) + GLOBAL_SCALE in checkpoint.tensors for name in packed)


def _described(stated: Any) -> str:
    stated = as_mapping(stated)
    method, algorithm = stated.get("quant_method"), stated.get("quant_algo")
    return f"{method or 'an unnamed method'}" + (f" ({algorithm})" if algorithm else "")


def declared(model: CheckpointModel) -> Mapping[str, Any]:
    """config.json's quantization_config; empty where there is none."""
    return as_mapping(model.detection.config.get("quantization_config"))


def is_declared(model: CheckpointModel) -> bool:
    """Whether any file says that the weights are quantized."""
    return _anywhere(model.detection.config) is not None or HF_QUANT_CONFIG in model.names


def excluded(model: CheckpointModel) -> list[str]:
    """The patterns of the modules that stay unquantized, from config.json or else from hf_quant_config.json."""
    stated = declared(model)
    if stated or HF_QUANT_CONFIG not in model.names:
        return _patterns(stated, "ignore")
    return _patterns(_hf_quant_config(model), "exclude_modules")


def quantization_findings(model: CheckpointModel) -> Iterator[Finding]:
    """Everything that keeps the packed weights from being read as they were meant."""
    yield from _declaration_findings(model)
    yield from _quantized_module_findings(model)
    yield from _excluded_findings(model)
    problems = list(_scale_findings(model))
    yield from problems
    if not problems:
        yield from _value_findings(model)


def _declaration_findings(model: CheckpointModel) -> Iterator[Finding]:
    stated = _anywhere(model.detection.config)
    if stated is None or (model.packed and not declared(model)):
        yield model.found("nvfp4-no-quantization-config")
    yield from _contradictions(model, stated)
    yield from _scheme_findings(model)
    if any(n.endswith(INPUT_SCALE) for n in model.companions):
        yield model.found("nvfp4-activations", algorithm=declared(model).get("quant_algo"))
    if HF_QUANT_CONFIG not in model.names:
        yield model.found("nvfp4-no-hf-quant-config")
    else:
        yield from _mismatches(model)


def _contradictions(model: CheckpointModel, stated: Any) -> Iterator[Finding]:
    """What config.json declares and the tensors do not hold."""
    if stated is not None and not _is_known(stated):
        stored = "as ModelOpt's NVFP4" if model.packed else "unquantized"
        yield model.found("nvfp4-declaration", found=_described(stated), stored=stored)
    elif model.packed and stated is not None:
        scaled = sum(name.removesuffix(WEIGHT) + INPUT_SCALE in model.companions for name in model.packed)
        needed = len(model.packed) if as_mapping(stated).get("quant_algo") == ALGORITHMS[1] else 0
        if scaled != needed:
            stored = f"with the input_scale of {scaled} of {len(model.packed)} quantized activations"
            yield model.found("nvfp4-declaration", found=_described(stated), stored=stored)
    cache = _declared_cache(model)
    if cache and not cache_scales(model):
        yield model.found("nvfp4-kv-cache", found=_short(cache))


def _declared_cache(model: CheckpointModel) -> Any:
    """What the key-value cache is to be quantized to; nothing where it is not."""
    return declared(model).get("kv_cache_scheme") or _hf_quant_config(model).get("kv_cache_quant_algo")


def cache_scales(model: CheckpointModel) -> Mapping[str, TensorInfo]:
    """The scales of a quantized key-value cache, where one is declared."""
    if not _declared_cache(model):
        return {}
    return {name: info for name, info in model.checkpoint.tensors.items() if name.endswith(_KV_SCALES)}


def _scheme_findings(model: CheckpointModel) -> Iterator[Finding]:
    """What config.json says of the format, group by group; engines read it beside the name of the algorithm."""
    stated = declared(model)
    sizes = {_short(stated["group_size"])} if stated.get("group_size") not in (None, BLOCK) else set()
    groups = stated.get("config_groups")
    for name, group in as_mapping(groups).items():
        weights = as_mapping(as_mapping(group).get("weights"))
        for field, expected in _SCHEME.items():
            if weights.get(field, expected) != expected:
                field_name = f"config_groups.{name}.weights.{field}"
                yield model.found("nvfp4-scheme", field=field_name, found=_short(weights[field]), expected=expected)
        if weights.get("group_size") not in (None, BLOCK):
            sizes.add(_short(weights["group_size"]))
        activations = as_mapping(group).get("input_activations")
        if activations is not None and stated.get("quant_algo") == ALGORITHMS[0]:
            field_name = f"config_groups.{name}.input_activations"
            yield model.found("nvfp4-scheme", field=field_name, found=_short(activations), expected="null")
    if groups is not None and not (
        isinstance(groups, Mapping) and all(isinstance(e, Mapping) for e in groups.values())
    ):
        yield model.found("nvfp4-scheme", field="config_groups", found=_short(groups), expected="an object of groups")
    yield from _module_list_findings(model, stated)
    other = _hf_quant_config(model).get("group_size")
    if other not in (None, BLOCK):
        sizes.add(_short(other))
    if sizes:
        yield model.found("nvfp4-group-size", found=min(sizes))


def _module_list_findings(model: CheckpointModel, stated: Mapping[str, Any]) -> Iterator[Finding]:
    """What names the modules that are left unquantized."""
    if "ignore" in stated and not _is_list_of_names(stated["ignore"]):
        yield model.found("nvfp4-scheme", field="ignore", found=_short(stated["ignore"]), expected="a list of names")
    fused = stated.get("packed_modules_mapping")
    if fused is not None:  # SGLang matches excluded modules by it
        yield model.found("nvfp4-scheme", field="packed_modules_mapping", found=_short(fused), expected="nothing")


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _short(value: Any) -> str:
    """A value as JSON writes it."""
    return json.dumps(value, default=str)


def _mismatches(model: CheckpointModel) -> Iterator[Finding]:
    """Where config.json and hf_quant_config.json differ, of which engines read one or the other."""
    stated, other = declared(model), _hf_quant_config(model)
    if stated:
        same = {"quant_algo": stated.get("quant_algo"), "exclude_modules": sorted(_patterns(stated, "ignore"))}
        for field, value in same.items():
            found = sorted(_patterns(other, field)) if isinstance(value, list) else other.get(field)
            if found != value:
                yield model.found("nvfp4-config-mismatch", field=field)


def _hf_quant_config(model: CheckpointModel) -> Mapping[str, Any]:
    if HF_QUANT_CONFIG not in model.names:
        return {}
    return as_mapping(read_json(model.checkpoint.directory / HF_QUANT_CONFIG).get("quantization"))


def _patterns(stated: Mapping[str, Any], field: str) -> list[str]:
    found = stated.get(field)
    return list(map(str, found)) if isinstance(found, list) else []


def _quantized_module_findings(model: CheckpointModel) -> Iterator[Finding]:
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
    exposed = [m for name in plain if not all(by(m := model.specs[name].module, patterns) for by in _EXCLUDED_BY)]
    if exposed:
        yield model.found("excluded-modules-missing", modules=listed_are(exposed))
    else:
        yield from _renamed_findings(model, plain, patterns)
    hidden = [m for n in model.packed if any(by(m := model.specs[n].module, patterns) for by in _EXCLUDED_BY)]
    if hidden:
        yield model.found("excluded-modules-packed", modules=listed_are(hidden))


def _renamed_findings(model: CheckpointModel, plain: Sequence[str], patterns: Sequence[str]) -> Iterator[Finding]:
    """Whole fused groups that SGLang does not find among the excluded modules, since it renames those first.

    sglang/…/quantization/modelopt_quant.py, apply_weight_name_mapper, and then is_layer_excluded on the name of the group.
    """
    renamed = model.detection.architecture.renamed
    mapped = [_renamed(pattern, renamed) for pattern in patterns]
    names = {*mapped, *(name.removeprefix("language_model.") for name in mapped)}
    groups = [g for g, members in _groups(model).items() if renamed and all(name in plain for name in members)]
    unseen = [group for group in groups if not _excluded_by_sglang(group, list(names))]
    if unseen:
        yield model.found("excluded-modules-renamed", modules=listed_are(unseen))


def _renamed(pattern: str, renamed: Mapping[str, str]) -> str:
    """The pattern with the longest beginning that is known replaced."""
    known = next((start for start in sorted(renamed, key=len, reverse=True) if pattern.startswith(start)), "")
    return renamed.get(known, "") + pattern.removeprefix(known)


def _engines_expect_packed(model: CheckpointModel, hf_name: str) -> bool:
    """Whether an engine, without a declaration, takes the module for a quantized one: linears and the head."""
    return bool(model.specs[hf_name].fused_group) or model.specs[hf_name].module == model.detection.architecture.head


def _excluded_by_vllm(module: str, patterns: Sequence[str]) -> bool:
    """vllm/…/quantization/modelopt.py, is_layer_excluded: equal, contained, or matching; `x*` stands for `x` and `x.*`."""
    tails = [pattern[:-1] for pattern in patterns if pattern.endswith("*") and not pattern.endswith(".*")]
    return any(pattern in module or fnmatchcase(module, pattern) for pattern in [*patterns, *tails] if pattern)


def _excluded_by_sglang(module: str, patterns: Sequence[str]) -> bool:
    """sglang/…/quantization/modelopt_quant.py, is_layer_excluded: the whole name matches, or one part between dots."""
    return any(fnmatchcase(part, pattern) for part in (module, *module.split(".")) for pattern in patterns)


_EXCLUDED_BY: Final = (_excluded_by_vllm, _excluded_by_sglang)
"""Whether each engine leaves a module of that name unquantized."""


def _scale_findings(model: CheckpointModel) -> Iterator[Finding]:
    expected = {scale: shape for name in model.packed for scale, shape in _scales_of(model, name).items()}
    missing = [name for name in expected if name not in model.companions]
    if missing:
        yield model.found("nvfp4-missing-scale", tensors=listed_are(missing))
    expected |= {
        name: () for name in (*model.companions, *cache_scales(model)) if name.endswith((INPUT_SCALE, *_KV_SCALES))
    }
    held = {**model.companions, **cache_scales(model)}
    present = {name: held[name] for name in expected if name in held}
    for name, info in present.items():
        dtype = "F8_E4M3" if name.endswith(BLOCK_SCALE) else "F32"
        if info.dtype != dtype:
            yield model.found("nvfp4-scale-type", tensor=name, found=info.dtype, expected=dtype)
            return
        if info.shape not in (expected[name], expected[name] or (1,)):  # a scalar may be stored as one of [1]
            found, needed = list(info.shape), list(expected[name])
            yield model.found("nvfp4-scale-shape", tensor=name, found=found, expected=needed)
            return


def _scales_of(model: CheckpointModel, hf_name: str) -> Mapping[str, tuple[int, ...]]:
    """The two scales of a packed weight and their shapes."""
    module, shape = model.specs[hf_name].module, model.specs[hf_name].shape
    return {module + BLOCK_SCALE: (*shape[:-1], shape[-1] // BLOCK), module + GLOBAL_SCALE: ()}


def _value_findings(model: CheckpointModel) -> Iterator[Finding]:
    values = _single_scales(model)
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


def _single_scales(model: CheckpointModel) -> dict[str, float] | None:
    """The global scale of every weight, and those of activations and of a key-value cache, by name; None where the hub would be asked too often."""
    by_file: dict[str, list[tuple[str, TensorInfo]]] = {}
    for name, info in (*model.companions.items(), *cache_scales(model).items()):
        if name.endswith((GLOBAL_SCALE, INPUT_SCALE, *_KV_SCALES)):
            by_file.setdefault(info.file.name, []).append((name, info))
    values: dict[str, float] = {}
    for file, scales in by_file.items():
        data = model.location.read_spans(file, [(info.offset, info.nbytes) for _, info in scales])
        if data is None:
            return None
        values |= {name: struct.unpack("<f", raw)[0] for (name, _), raw in zip(scales, data, strict=True)}
    return values
