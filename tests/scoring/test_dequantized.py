from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.arch.spec import Task
from qtool.errors import ModelError
from qtool.inputs.items import Item, Pair
from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer

PAIRS = [Pair(Item("q", ("which ball?",)), Item(f"d{n}", ("a ball " * n,))) for n in range(4)]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
VICTIM = "model.language_model.layers.0.mlp.up_proj.weight"
CONFIG = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": 16, "ignore": ["lm_head"]}
Tensors = dict[str, torch.Tensor]


def quantized(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Random NVFP4 of a weight's shape, and torch's own reading of it."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scales = torch.empty(rows, columns // 16).uniform_(50, 400).to(torch.float8_e4m3fn)
    global_scale = torch.tensor(0.0003 + 0.0003 * torch.rand(()).item())
    tensors = {
        "": codes[:, ::2] | codes[:, 1::2] << 4,
        "_scale": scales,
        "_scale_2": global_scale,
    }
    return tensors, E2M1[codes.int()] * scales.float().repeat_interleave(16, dim=1) * global_scale


@pytest.fixture(scope="module")
def artefact(vl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artefact in ModelOpt's layout, and the same weights unpacked by torch as an F32 checkpoint."""
    torch.manual_seed(1)
    packed: Tensors = {}
    unpacked: Tensors = {}
    for name, weight in load_file(vl_model / "model.safetensors").items():
        if "_proj.weight" in name and "visual" not in name:
            tensors, values = quantized(weight)
            packed.update({name + suffix: tensor.contiguous() for suffix, tensor in tensors.items()})
            unpacked[name] = values
        else:
            packed[name] = weight
            unpacked[name] = weight.float()
    folders = (tmp_path_factory.mktemp("nvfp4") / "packed", tmp_path_factory.mktemp("nvfp4") / "unpacked")
    for folder, weights in zip(folders, (packed, unpacked), strict=True):
        shutil.copytree(vl_model, folder)
        save_file(weights, folder / "model.safetensors")
    configure(folders[0], CONFIG)
    return folders


def configure(folder: Path, quantization: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def scores(folder: Path) -> list[float]:
    return open_scorer(folder, ScorerOptions(Task.RERANK, device="cpu")).score(PAIRS)


def test_an_artefact_scores_as_the_weights_that_its_bytes_mean(artefact: tuple[Path, Path]) -> None:
    packed, unpacked = artefact
    np.testing.assert_allclose(scores(packed), scores(unpacked), rtol=0, atol=1e-4)
    assert np.ptp(scores(packed)) > 0.01


def broken(artefact: tuple[Path, Path], target: Path, edit: Callable[[Tensors], object]) -> Path:
    shutil.copytree(artefact[0], target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(VICTIM + "_scale_2"), r"up_proj\.weight_scale_2 is missing"),
        (lambda t: t.pop(VICTIM + "_scale"), r"up_proj\.weight_scale is missing"),
        (lambda t: t.pop(VICTIM), r"up_proj\.weight"),
        (
            lambda t: t.update({VICTIM + "_scale": t[VICTIM + "_scale"].view(torch.uint8)}),
            r"up_proj\.weight_scale is stored as U8",
        ),
        (
            lambda t: t.update({VICTIM + "_scale": t[VICTIM + "_scale"][:, 1:].contiguous()}),
            r"weight_scale has shape \[128, 3\]",
        ),
        (lambda t: t.update({VICTIM + "_scale_2": torch.ones(2)}), r"weight_scale_2 has shape \[2\]"),
        (lambda t: t.update({VICTIM: torch.zeros(7, dtype=torch.uint8)}), r"up_proj\.weight"),
    ],
    ids=["no-global", "no-block", "no-weight", "block-as-u8", "block-shape", "global-shape", "weight-shape"],
)
def test_broken_packing_is_named(
    artefact: tuple[Path, Path], tmp_path: Path, edit: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        scores(broken(artefact, tmp_path / "m", edit))


@pytest.mark.parametrize("quantization", [{"quant_algo": "FP8"}, {"quant_method": "gptq"}, "nvfp4"])
def test_another_quantization_is_refused(artefact: tuple[Path, Path], tmp_path: Path, quantization: object) -> None:
    other = Path(shutil.copytree(artefact[0], tmp_path / "m"))
    configure(other, quantization)
    with pytest.raises(ModelError, match=r"quantization"):
        scores(other)


def test_packed_weights_that_config_json_does_not_declare_are_refused(
    artefact: tuple[Path, Path], vl_model: Path, tmp_path: Path
) -> None:
    silent = Path(shutil.copytree(artefact[0], tmp_path / "m"))
    shutil.copy(vl_model / "config.json", silent / "config.json")
    with pytest.raises(ModelError, match=r"is stored as F8_E4M3; expected BF16, F16 or F32"):
        scores(silent)
