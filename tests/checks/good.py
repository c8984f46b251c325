"""Good artefacts of every type, made by qtool from small random checkpoints with the demo models' tokenizer and side files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qtool import resources
from qtool.resources import DEFAULT_RECIPE
from tests.export.models import EMBEDDER, RERANKER, SIZES
from tests.tiny import random_tensors, text_config, vl_config, write_checkpoint

SQUARE = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3}
"""As many keys as queries, so that the two can be taken for each other."""

PICTURES = {"image_token_id": 765, "video_token_id": 766, "vision_start_token_id": 762, "vision_end_token_id": 763}
"""Where the demo tokenizer has them."""

CONFIGS = {
    "vl": vl_config(SQUARE) | PICTURES,
    "wide": vl_config({**SQUARE, "hidden_size": 128}) | PICTURES,
    "text": text_config(SQUARE),
    "tied-text": text_config(SQUARE, tied=True),
}


def write_reference(
    folder: Path, form: str, *, task: str = "rerank", seed: int = 0, shards: int = 1, even: bool = False
) -> Path:
    """A checkpoint of random weights; every second seed has heavy tails and tiny values, as trained models have.

    With `even` all matrices are about equally large and norms are near 1, so that each layer counts for something.
    """
    config = CONFIGS[form]

    def change(tensors):
        tensors.update(random_tensors(config, seed=seed))
        for index, (name, tensor) in enumerate(tensors.items() if even else ()):
            values = tensor.float()
            values = (
                values / values.std() * 0.04 * 1.1 ** (index % 7)
                if tensor.ndim > 1
                else 1 + 0.3 * values / values.std()
            )
            tensors[name] = values.to(tensor.dtype)
        if seed % 2:
            for name, tensor in tensors.items():
                tensors[name] = (tensor.float() ** 3 * 10).to(tensor.dtype)

    write_checkpoint(folder, config, change=change, shards=shards)
    demo = resources.demo_model(RERANKER if task == "rerank" else EMBEDDER)
    for source in demo.iterdir():
        if source.is_dir():
            shutil.copytree(source, folder / source.name)
        elif source.name not in ("config.json", "model.safetensors", "README.md"):
            shutil.copyfile(source, folder / source.name)
    if form.endswith("text"):
        _forget_pictures(folder)
    return folder


def _forget_pictures(folder: Path) -> None:
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink()


def append_end(folder: Path) -> None:
    """Let the tokenizer end every text, as Qwen3-Embedding's does."""
    path, token = folder / "tokenizer.json", "<|endoftext|>"
    tokenizer = json.loads(path.read_text())
    number = next(each["id"] for each in tokenizer["added_tokens"] if each["content"] == token)
    sequence, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 0}}
    template = {
        "type": "TemplateProcessing", "single": [sequence, end], "pair": [sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }  # fmt: skip
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [tokenizer["post_processor"], template]}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


REFERENCES = {
    "reranker": {"form": "vl", "even": True},
    "reranker-shards": {"form": "vl", "shards": 3},
    "reranker-revised": {"form": "vl", "shards": 3, "seed": 2},
    "reranker-wide": {"form": "wide", "seed": 4},
    "embedder": {"form": "vl", "task": "embed"},
    "text-reranker": {"form": "text", "even": True},
}


class ArtefactBuilder:
    """Makes each artefact once; `NAME/TYPE` is the artefact of that type of the reference `NAME`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def reference(self, name: str) -> Path:
        """The reference of that name."""
        folder = self._root / name / "reference"
        return folder if folder.exists() else write_reference(folder, **REFERENCES[name])

    def good(self, name: str) -> Path:
        """The good artefact of that name."""
        reference, _, kind = name.partition("/")
        folder = self._root / reference / kind
        return folder if folder.exists() else make(self.reference(reference), folder, kind)


def calibrate(reference: Path, folder: Path, *, effort: str = "fast", data: str = "demo-text") -> Path:
    """The artefact whose weights are fitted to a few texts, which takes a second."""
    from qtool.calibration.quantize import quantize_calibrated
    from qtool.export.quantize import QuantizeOptions

    recipe = folder.with_name("calibrated.yaml")
    text = resources.path("recipes/nvfp4-w4a16-calibrated.yaml").read_text()
    recipe.write_text(text.replace("tokens: 65536", "tokens: 1000"))
    options = QuantizeOptions(model=str(reference), output=folder, recipe=str(recipe), data=(data,), effort=effort)
    quantize_calibrated(options)
    return folder


def make(reference: Path, folder: Path, kind: str) -> Path:
    """The artefact of one type: `copy`, `nvfp4`, `calibrated`, `mse`, `4over6`, or a GGUF type.

    `gguf-nvfp4` and `gguf-calibrated` repack the quantized folder.
    """
    from qtool.export.convert import convert_gguf
    from qtool.export.gguf_plan import ConvertOptions
    from qtool.export.quantize import QuantizeOptions, quantize

    if kind == "copy":
        shutil.copytree(reference, folder)
        return folder
    if kind == "calibrated":
        return calibrate(reference, folder)
    if kind in ("nvfp4", "mse", "4over6"):
        recipe = DEFAULT_RECIPE if kind == "nvfp4" else f"{DEFAULT_RECIPE}-{kind}"
        quantize(QuantizeOptions(model=str(reference), output=folder, recipe=recipe))
        return folder
    source, outtype = reference, kind.removeprefix("gguf-")
    if outtype in ("nvfp4", "calibrated"):
        source, outtype = folder.with_name(outtype), "nvfp4"
        if not source.exists():
            make(reference, source, source.name)
    convert_gguf(ConvertOptions(model=str(source), output=folder, outtypes=(outtype,)))
    for path in folder.glob("*.gguf"):
        path.rename(folder / ("mmproj.gguf" if "mmproj" in path.name else "model.gguf"))
    return folder
