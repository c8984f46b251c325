"""`mse` and four-over-six: streaming writes the bytes of ModelOpt's calibrators and exporter.

ModelOpt searches on a GPU only: its fake quantizer is a Triton kernel. Here that one kernel is replaced by its own
arithmetic in torch; the calibrators, the scales and the export are the real ones.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool import resources
from qtool.errors import SetupError
from qtool.export.quantize import QuantizeOptions, quantize
from tests.export.test_golden import CASES, assert_same_bytes, assert_same_files
from tests.tiny import write_checkpoint

RECIPES = ("nvfp4-w4a16-mse", "nvfp4-w4a16-4over6")


def fake_quantize(x, amax, global_amax, _scales, fp8_max, dtype, _backward):
    """What `static_blockwise_fp4_fake_quant` computes."""
    from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl

    scale = scaled_e4m3_impl(amax.float() / 6.0, global_amax.float() * (448.0 / fp8_max) / 6.0).reshape(-1, 1)
    blocks = x.float().reshape(-1, 16)
    safe = torch.where(scale == 0, 1.0, scale)
    quotient = blocks.abs() / safe
    rounded = torch.zeros_like(blocks)
    for value, reached in ((0.5, quotient > 0.25), (1, quotient >= 0.75), (1.5, quotient > 1.25), (2, quotient >= 1.75),
                           (3, quotient > 2.5), (4, quotient >= 3.5), (6, quotient > 5)):  # fmt: skip
        rounded[reached] = value
    restored = torch.where(blocks >= 0, rounded * safe, -rounded * safe)
    return torch.where(scale == 0, 0.0, restored).reshape(x.shape).to(dtype)


@pytest.fixture
def searching_modelopt(monkeypatch):
    from modelopt.torch.kernels.quantization import gemm
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    monkeypatch.setattr(gemm, "IS_AVAILABLE", True)
    monkeypatch.setattr(tensor_quantizer, "static_blockwise_fp4_fake_quant", fake_quantize)


@pytest.mark.usefixtures("searching_modelopt")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", ["text-hard-blocks", "text-float16", "text-float32"])
def test_both_backends_write_the_same_bytes(case, recipe, tmp_path):
    config, options = CASES[case]
    model = write_checkpoint(tmp_path / "source", config, **options)
    for backend in ("streaming", "modelopt"):
        quantize(QuantizeOptions(model=str(model), output=tmp_path / backend, backend=backend, recipe=recipe))
    assert_same_bytes(tmp_path / "streaming", tmp_path / "modelopt")
    assert_same_files(tmp_path / "streaming", tmp_path / "modelopt")


@pytest.mark.usefixtures("searching_modelopt")
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_demo_reranker_equals_modelopts(recipe, tmp_path):
    for backend in ("streaming", "modelopt"):
        name = resources.demo_models()[0]
        quantize(QuantizeOptions(model=name, output=tmp_path / backend, backend=backend, recipe=recipe))
    assert_same_bytes(tmp_path / "streaming", tmp_path / "modelopt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="ModelOpt can search here")
def test_modelopt_without_a_gpu_is_refused_with_what_to_do(tmp_path):
    name = resources.demo_models()[0]
    with pytest.raises(SetupError, match="Triton") as refused:
        quantize(QuantizeOptions(model=name, output=tmp_path / "out", backend="modelopt", recipe=RECIPES[0]))
    assert "--backend streaming" in refused.value.hint


@pytest.mark.parametrize("seed", range(4))
def test_the_compiled_searches_equal_their_references(seed):
    from qtool.formats import nvfp4_search, nvfp4_search_kernels

    random = np.random.default_rng(seed)
    weights = (random.standard_t(3, size=16 * 300) * 10.0 ** random.integers(-8, 3)).astype(np.float32)
    weights[:16] = 0
    weights[16:32] *= np.float32(1e-6)
    amax, codes = np.abs(weights).max(), np.empty(300, np.uint8)
    nvfp4_search_kernels.search_mse(weights, amax, codes)
    assert np.array_equal(codes, nvfp4_search.search_mse_reference(weights, amax))
    nvfp4_search_kernels.search_four_over_six(weights, amax, codes)
    assert np.array_equal(codes, nvfp4_search.search_four_over_six_reference(weights, amax))
