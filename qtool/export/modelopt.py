"""The reference backend: NVIDIA ModelOpt itself, with the whole model in memory, on a GPU where there is one.

The only file that imports modelopt. It gets the recipe's patterns and nothing else to decide.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import numpy as np

from qtool.errors import ModelError, SetupError
from qtool.export.nvfp4 import check_weights, quantization_sources, relative_error
from qtool.export.quantize_plan import Action, PlannedTensor, QuantizationPlan, hf_quant_config
from qtool.export.tensor_writer import chunk_ranges, float_format_of, read_bits
from qtool.formats.nvfp4 import BLOCK
from qtool.formats.nvfp4_kernels import dequantize
from qtool.jsonfile import read_json
from qtool.progress import Advance, Meter, Progress
from qtool.recipe import Recipe
from qtool.storage.checkpoint import Checkpoint, read_header
from qtool.storage.packed import BLOCK_SCALE, GLOBAL_SCALE

_TORCH_DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def quantize_modelopt(
    checkpoint: Checkpoint, plan: QuantizationPlan, folder: Path, max_shard_bytes: int, progress: Progress
) -> Mapping[str, float]:
    """Write ModelOpt's export of `plan` into `folder`; the relative error of each quantized tensor."""
    if plan.recipe.algorithm in _SEARCHES:
        _require_search_kernels(plan.recipe.algorithm)
    sources = quantization_sources(checkpoint, plan)
    meter = Meter(sum(source.work_bytes for source in sources), progress)
    check_weights(sources, meter.advance)
    with _quiet():
        _quantize_and_export(_load(checkpoint, plan), plan, folder, max_shard_bytes)
    _require_same_description(plan, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # ModelOpt makes one up; the source's is copied
    return _relative_errors(checkpoint, plan, folder, meter.advance)


def _load(checkpoint: Checkpoint, plan: QuantizationPlan) -> Any:
    import torch
    import transformers

    name = plan.detection.architecture.name
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise SetupError(f"transformers {transformers.__version__} has no {name}.", "Use --backend streaming.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_class.from_pretrained(checkpoint.directory, dtype=getattr(torch, _dtype(plan))).to(device)
    if not _has_head(plan):
        model.lm_head = torch.nn.Identity()  # else transformers' random one would be exported
    return model.eval()


def _dtype(plan: QuantizationPlan) -> str:
    dtypes = {tensor.source.dtype for tensor in plan.tensors}
    if len(dtypes) > 1:
        raise ModelError(
            f"The checkpoint mixes {' and '.join(sorted(dtypes))}; ModelOpt would cast all to one.",
            "Use --backend streaming, which keeps each as it is.",
        )
    return _TORCH_DTYPES[dtypes.pop()]


def _has_head(plan: QuantizationPlan) -> bool:
    config = plan.detection.config
    if plan.detection.architecture.head != "lm_head":
        return True
    return bool(config.get("tie_word_embeddings", False)) or any(
        tensor.spec.module == "lm_head" for tensor in plan.tensors
    )


_SEARCHES: Final[Mapping[str, Mapping[str, Any]]] = {
    "mse": {"method": "mse", "fp8_scale_sweep": True},
    "four-over-six": {
        "method": "mse",
        "fp8_scale_sweep": False,
        "start_multiplier": 1.0,
        "stop_multiplier": 1.5,
        "step_size": 0.5,
    },
}
"""ModelOpt's settings for the algorithms that search block scales; both need its Triton kernels."""


def _require_search_kernels(algorithm: str) -> None:
    from modelopt.torch.kernels.quantization import gemm

    if not gemm.IS_AVAILABLE:
        raise SetupError(
            f"ModelOpt searches block scales (algorithm {algorithm}) with Triton, which needs a CUDA device.",
            "Use --backend streaming, which writes the same bytes.",
        )


def modelopt_config(recipe: Recipe, kept: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe as ModelOpt's quantization config: everything off, the recipe's patterns on, then the modules `kept` off."""
    block_sizes: dict[Any, Any] = {-1: recipe.block_size, "type": "dynamic", "scale_bits": (4, 3)}
    if recipe.algorithm in _SEARCHES:
        block_sizes["type"] = "static"
    if recipe.algorithm == "four-over-six":
        block_sizes["four_over_six"] = True
    weights = {"num_bits": (2, 1), "block_sizes": block_sizes}
    enabled = [{"quantizer_name": f"{p}.weight_quantizer", "cfg": weights, "enable": True} for p in recipe.quantize]
    enabled += [{"quantizer_name": f"{module}.weight_quantizer", "enable": False} for module in kept]
    algorithm = _SEARCHES.get(recipe.algorithm, recipe.algorithm)
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *enabled], "algorithm": algorithm}


def _quantize_and_export(model: Any, plan: QuantizationPlan, folder: Path, max_shard_bytes: int) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    with torch.inference_mode():
        mtq.quantize(model, modelopt_config(plan.recipe, _kept(plan)), forward_loop=None)
        export_hf_checkpoint(model, export_dir=folder, max_shard_size=max_shard_bytes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # ModelOpt prints to stdout, where qtool's result alone belongs.
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _require_same_description(plan: QuantizationPlan, folder: Path) -> None:
    written, expected = read_json(folder / "hf_quant_config.json"), hf_quant_config(plan)
    if not _has_head(
        plan
    ):  # taken out above, so ModelOpt does not name it; engines that make one up must leave it alone
        expected["quantization"]["exclude_modules"].remove("lm_head")
    if not _mean_the_same(written["quantization"], expected["quantization"], plan):
        raise SetupError(
            f"ModelOpt {written['producer']['version']} describes its export differently than expected: {written['quantization']}.",
            "Install the ModelOpt release that `qtool doctor` names.",
        )


def _mean_the_same(written: Mapping[str, Any], expected: Mapping[str, Any], plan: QuantizationPlan) -> bool:
    """Whether both exclude the same modules and say the same of all else; ModelOpt shortens names of kept siblings."""

    def meaning(stated: Mapping[str, Any]) -> Mapping[str, Any]:
        patterns = stated.get("exclude_modules", ())
        modules = {tensor.spec.module for tensor in plan.tensors if tensor.spec.fused_group}
        excluded = {module for module in modules if any(fnmatchcase(module, pattern) for pattern in patterns)}
        others = set(patterns) & set(plan.detection.architecture.unquantized)
        return {**stated, "exclude_modules": (excluded, others)}

    return meaning(written) == meaning(expected)


def _kept(plan: QuantizationPlan) -> list[str]:
    """The modules of kept groups, which the recipe's patterns under `quantize` may match."""
    return [t.spec.module for t in plan.tensors if t.spec.fused_group and t.action is Action.COPY]


def _relative_errors(
    checkpoint: Checkpoint, plan: QuantizationPlan, folder: Path, advance: Advance
) -> Mapping[str, float]:
    """|w - q| / |w| of each quantized tensor, from the bytes that ModelOpt wrote."""
    infos = {info.hf_name: info for path in sorted(folder.glob("*.safetensors")) for info in read_header(path)}
    written = Checkpoint(folder, {}, infos)
    return {
        tensor.spec.hf_name: relative_error(_squares(checkpoint, tensor, written, advance))
        for tensor in plan.tensors
        if tensor.action is Action.QUANTIZE
    }


def _squares(
    checkpoint: Checkpoint, tensor: PlannedTensor, written: Checkpoint, advance: Advance
) -> Iterator[tuple[float, float]]:
    """|w - q|² and |w|² of a tensor, chunk by chunk."""
    packed = written.read(tensor.spec.hf_name).reshape(-1)
    block_scales = written.read(f"{tensor.spec.module}{BLOCK_SCALE}").reshape(-1)
    scale = np.float32(written.read(f"{tensor.spec.module}{GLOBAL_SCALE}").item())
    element = float_format_of(tensor.source)
    for start, nbytes in chunk_ranges(tensor.source.nbytes):
        weights = element.widen(read_bits(checkpoint, tensor.source, start, nbytes))
        first = start // element.itemsize
        codes = packed[first // 2 : (first + weights.size) // 2]
        scales = block_scales[first // BLOCK : (first + weights.size) // BLOCK]
        delta = weights - dequantize(codes[None], scales, scale)[0]
        yield float(delta @ delta), float(weights @ weights)
        advance(nbytes)
