"""GGUF files for tests, made by qtool's own converter, and broken ones made of those."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.export.quantize import QuantizeOptions, quantize
from qtool.storage.gguf import Value, read_gguf
from qtool.storage.gguf_layout import GgufOutputTensor, lay_out
from tests.export import models


def gguf_of(model: Path, outtype: str, folder: Path, **options: str) -> Path:
    """The language model of the checkpoint in `model`, converted once; `options` are ConvertOptions'."""
    path = folder / "-".join([model.name, outtype, *options]) / "model.gguf"
    if not path.exists():
        path.parent.mkdir()
        convert_gguf(ConvertOptions(model=str(model), output=path, outtypes=(outtype,), mmproj="none", **options))
    return path


def projector_of(model: Path, folder: Path, outtype: str = "f32") -> Path:
    """The projector of the checkpoint in `model`, converted once."""
    output = folder / f"{model.name}-mmproj-{outtype}"
    if not output.exists():
        convert_gguf(ConvertOptions(model=str(model), output=output, outtypes=("q8_0",), mmproj=outtype))
    return next(output.glob("mmproj-*.gguf"))


def quantized(model: Path, folder: Path) -> Path:
    """The NVFP4 artefact of a checkpoint."""
    output = folder / f"{model.name}-nvfp4-artefact"
    quantize(QuantizeOptions(model=str(model), output=output))
    return output


def changed(source: Path, target: Path, metadata: Mapping[str, Value | None], without: Collection[str] = ()) -> Path:
    """A copy of a GGUF file with other metadata (None removes a key) or fewer tensors."""
    gguf, data = read_gguf(source), source.read_bytes()
    fields = {key: value for key, value in {**gguf.metadata, **metadata}.items() if value is not None}
    kept = [tensor for name, tensor in gguf.tensors.items() if name not in without]
    outputs = [GgufOutputTensor(tensor.gguf_name, tensor.type, tensor.shape, tensor.nbytes) for tensor in kept]
    (layout,) = lay_out(target.name, fields, outputs)
    content = bytearray(layout.nbytes)
    content[: len(layout.header)] = layout.header
    for tensor in kept:
        start, nbytes = layout.ranges[tensor.gguf_name]
        content[start : start + nbytes] = data[tensor.offset : tensor.offset + nbytes]
    target.write_bytes(content)
    return target


def text_family_of(demo: Path, folder: Path, *, ends_texts: bool = False) -> Path:
    """The language part of a trained VL model as a checkpoint of the text family; `ends_texts` as Qwen3-Embedding does."""
    copy = folder / f"{demo.name}-text"
    shutil.copytree(demo, copy)
    weights = load_file(demo / "model.safetensors")
    prefix = "model.language_model."
    kept = {"model." + name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    save_file(kept, copy / "model.safetensors")
    config = json.loads((demo / "config.json").read_text())["text_config"]
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_scaling": None, "rope_parameters": rope}
    (copy / "config.json").write_text(json.dumps({**config, **own}))
    if ends_texts:
        models._append(copy, "<|endoftext|>")
    return copy
