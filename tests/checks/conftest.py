"""Healthy artefacts of every kind, made once by qtool itself from the demo models and from small random ones."""

from __future__ import annotations

import json
import shutil

import pytest

from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.export.quantize import QuantizeOptions, quantize
from tests.checks.good import ArtefactBuilder
from tests.export.models import MODELS

_CHECKPOINTS = {
    "reranker": "demo-reranker",
    "embedder": "demo-embedder",
    "text-reranker": "text-reranker-untied",
    "text-embedder": "text-embedder-appends",
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Maker of a healthy artefact by name: a checkpoint, or with -gguf, -nvfp4 or -nvfp4-gguf what is made of it."""
    root = tmp_path_factory.mktemp("healthy")

    def make(name):
        folder = root / name
        if folder.exists():
            return folder
        if name in _CHECKPOINTS:
            MODELS[_CHECKPOINTS[name]](folder)
            if not (folder / "config_sentence_transformers.json").exists():
                (folder / "config_sentence_transformers.json").write_text("{}")
        elif name.endswith("-gguf"):
            source = name.removesuffix("-gguf")
            types = ("nvfp4",) if source.endswith("-nvfp4") else ("f16",)
            convert_gguf(ConvertOptions(model=str(make(source)), output=folder, outtypes=types))
            for path in folder.glob("*.gguf"):
                path.rename(folder / ("mmproj.gguf" if "mmproj" in path.name else "model.gguf"))
        else:
            quantize(QuantizeOptions(model=str(make(name.removesuffix("-nvfp4"))), output=folder))
        return folder

    return make


@pytest.fixture
def copy_of(made, tmp_path):
    """Likewise, as a copy that a test may break."""
    return lambda name: shutil.copytree(made(name), tmp_path / name)


def edit_json(path, **changes):
    """Set or (with None) drop fields of a JSON file."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: each for key, each in value.items() if each is not None}))


@pytest.fixture(scope="session")
def builder(tmp_path_factory):
    """Maker of good artefacts."""
    return ArtefactBuilder(tmp_path_factory.mktemp("good"))
