from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import Item, Pair, Video
from qtool.scoring.transformers.prefix import BatchLimits
from qtool.scoring.transformers.runtime import ScorerOptions, TransformersScorer, open_scorer
from tests.inputs.films import Film, frames
from tests.scoring import official, tiny

ONE_BY_ONE = BatchLimits(prompts=1)


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


TEXTS = ["no", "yes, it is a red ball", "a much longer document " * 12, "<|image_pad|> spelled out", "你好 🙂", ""]
TEXT_PAIRS = [Pair(Item("q", ("which ball?",)), Item(f"d{n}", (text,))) for n, text in enumerate(TEXTS)]
PICTURE_PAIRS = [
    Pair(Item("q", ("which ball?",)), Item("p0", image=(picture(0),))),
    Pair(Item("q", ("which ball?",)), Item("p1", ("a caption " * 9,), (picture(1, 64, 128), picture(2)))),
    Pair(Item("q2", ("like this",), (picture(3, 128, 128),)), Item("p2", image=(picture(4),))),
]


FRAMES = frames(4, 512, 256, seed=1)
"""Neither official resize touches frames of this size."""


@pytest.fixture(scope="module")
def film_pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """A list of frames, a file of the same frames at two a second, and several of everything on both sides."""
    film = Film(4, Fraction(2), 512, 256, seed=1).write(tmp_path_factory.mktemp("films") / "film.mov")
    listed, filed = Video(FRAMES), Video(str(film))
    return [
        Pair(Item("q", ("which ball?",)), Item("f0", video=(listed,))),
        Pair(Item("q", ("which ball?",)), Item("f1", ("a caption",), video=(filed,))),
        Pair(Item("q3", video=(Video(FRAMES[2:]),)), Item("f2", ("a", "b"), (picture(1), picture(2)), (filed, listed))),
        Pair(Item("q4", ("like",), (picture(3),), (listed,)), Item("f3", image=(picture(4),))),
    ]


def films_of(item: Item) -> list[tuple[Image.Image, ...]]:
    return [FRAMES if isinstance(video.source, str) else video.source for video in item.video]


def rerank(directory: Path, limits: BatchLimits = BatchLimits(), **options: str) -> TransformersScorer:  # noqa: B008
    return open_scorer(directory, ScorerOptions(Task.RERANK, limits=limits, device="cpu", **options))


def embedder(directory: Path, limits: BatchLimits = BatchLimits()) -> TransformersScorer:  # noqa: B008
    return open_scorer(directory, ScorerOptions(Task.EMBED, limits=limits, device="cpu"))


def prompt_of(item: Item) -> str:
    films = (official.film_text(film, ["0.2", "1.2"][: len(film) // 2]) for film in films_of(item))
    return "".join(films) + "".join(official.picture_text(image) for image in item.image) + "".join(item.text)


def official_score(model: object, directory: Path, pair: Pair, template: str, instruction: str) -> float:
    prompt = template.format(instruction=instruction, query=prompt_of(pair.query), document=prompt_of(pair.document))
    images, films = [*pair.query.image, *pair.document.image], [*films_of(pair.query), *films_of(pair.document)]
    return official.log_odds(model, directory, prompt, images, films)


@pytest.mark.parametrize("tied", [True, False])
def test_vl_scores_equal_the_official_computation_on_texts_pictures_and_videos(
    tmp_path: Path,
    tied: bool,  # noqa: FBT001
    film_pairs: list[Pair],
) -> None:
    directory = tiny.write_vl(tmp_path, tied=tied, seed=7)
    model = official.load(directory)
    pairs = [*TEXT_PAIRS, *PICTURE_PAIRS, *film_pairs]
    expected = [
        official_score(model, directory, pair, official.VL_RERANK, official.VL_RERANK_INSTRUCTION) for pair in pairs
    ]
    assert np.std(expected) > 0.1
    # Measured: 5e-6 on scores of up to 4.
    np.testing.assert_allclose(rerank(directory).score(pairs), expected, rtol=0, atol=1e-5)


def test_text_scores_equal_the_official_computation(text_model: Path) -> None:
    model = official.load(text_model)
    expected = [
        official_score(model, text_model, pair, official.TEXT_RERANK, official.TEXT_RERANK_INSTRUCTION)
        for pair in TEXT_PAIRS
    ]
    np.testing.assert_allclose(rerank(text_model).score(TEXT_PAIRS), expected, rtol=0, atol=1e-5)


def test_vl_vectors_equal_the_official_computation(vl_model: Path, film_pairs: list[Pair]) -> None:
    model = official.load(vl_model)
    items = [pair.document for pair in [*TEXT_PAIRS, *PICTURE_PAIRS, *film_pairs]]
    for item, vector in zip(items, embedder(vl_model).embed(items), strict=True):
        prompt = official.VL_EMBED.format(instruction="Represent the user's input.", content=prompt_of(item))
        expected = official.embedding(model, vl_model, prompt, item.image, films_of(item))
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5)


def test_text_vectors_equal_the_official_computation(text_model: Path) -> None:
    model = official.load(text_model)
    item = Item("q", ("which ball?",), instruction="Find it")
    vector = embedder(text_model).embed([item])[0]
    expected = official.embedding(model, text_model, "Instruct: Find it\nQuery:which ball?<|endoftext|>")
    np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5)
    assert np.linalg.norm(vector) == pytest.approx(1)


@pytest.mark.parametrize("model", ["vl_model", "text_model"])
def test_batches_score_as_single_pairs_do(model: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(model)
    pairs = TEXT_PAIRS if model == "text_model" else [*PICTURE_PAIRS, *TEXT_PAIRS]
    documents = [pair.document for pair in pairs]
    np.testing.assert_allclose(
        rerank(directory).score(pairs), rerank(directory, ONE_BY_ONE).score(pairs), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
        embedder(directory).embed(documents), embedder(directory, ONE_BY_ONE).embed(documents), rtol=0, atol=1e-5
    )


def test_scores_come_in_the_callers_order_whatever_the_batches(vl_model: Path) -> None:
    pairs = [*TEXT_PAIRS, *PICTURE_PAIRS]
    seen: dict[int, float] = {}
    scorer = rerank(vl_model, BatchLimits(padded_tokens=900, prompts=3, window_tokens=500))
    forward = scorer.score(pairs, seen.__setitem__)
    np.testing.assert_allclose(forward, scorer.score(pairs[::-1])[::-1], rtol=0, atol=1e-5)
    assert [float(seen[place]) for place in range(len(pairs))] == forward
    assert list(seen) != sorted(seen)
    assert scorer.score([]) == []


def test_bf16_is_near_fp32_and_an_unknown_dtype_is_refused(vl_model: Path) -> None:
    exact = np.array(rerank(vl_model).score(TEXT_PAIRS))
    rounded = np.array(rerank(vl_model, dtype="bfloat16").score(TEXT_PAIRS))
    assert 0 < np.abs(exact - rounded).max() < 1
    with pytest.raises(UsageError, match="int4"):
        rerank(vl_model, dtype="int4")


def test_each_task_refuses_the_others_question(vl_model: Path) -> None:
    with pytest.raises(UsageError, match="embedder and cannot score"):
        embedder(vl_model).score(TEXT_PAIRS)
    with pytest.raises(UsageError, match="a reranker and cannot embed"):
        rerank(vl_model).embed([])


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def test_a_missing_tensor_is_named(vl_model: Path, tmp_path: Path) -> None:
    gone = "model.language_model.layers.1.self_attn.q_norm.weight"
    broken = edited(vl_model, tmp_path / "m", lambda tensors: tensors.pop(gone))
    with pytest.raises(ModelError, match=r"has no language_model\.layers\.1\.self_attn\.q_norm\.weight"):
        rerank(broken).score(TEXT_PAIRS)


def test_an_unexpected_tensor_is_named(vl_model: Path, tmp_path: Path) -> None:
    extra = {"model.language_model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2, dtype=torch.bfloat16)}
    broken = edited(vl_model, tmp_path / "m", lambda tensors: tensors.update(extra))
    with pytest.raises(ModelError, match=r"layers\.9\.mlp\.up_proj\.weight"):
        rerank(broken).score(TEXT_PAIRS)


def test_a_tensor_of_the_wrong_shape_is_named(text_model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    broken = edited(text_model, tmp_path / "m", lambda tensors: tensors.update({name: tensors[name][1:]}))
    with pytest.raises(ModelError, match=r"up_proj\.weight has shape \[127, 64\].*\[128, 64\]"):
        rerank(broken).score(TEXT_PAIRS)


def test_an_unknown_element_type_is_named(text_model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    broken = edited(text_model, tmp_path / "m", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ModelError, match=r"up_proj\.weight is stored as I8"):
        rerank(broken).score(TEXT_PAIRS)


def test_weights_that_are_not_numbers_name_the_pair(text_model: Path, tmp_path: Path) -> None:
    broken = edited(text_model, tmp_path / "m", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"query 'q', document 'd.'.*not a finite number"):
        rerank(broken).score(TEXT_PAIRS)
    with pytest.raises(ModelError, match=r"item 'd.'.*not a finite number"):
        embedder(broken).embed([pair.document for pair in TEXT_PAIRS])


def test_an_untied_reranker_needs_its_head_and_an_untied_embedder_does_not(text_model: Path, tmp_path: Path) -> None:
    headless = edited(text_model, tmp_path / "m", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"has no lm_head\.weight"):
        rerank(headless).score(TEXT_PAIRS)
    items = [pair.document for pair in TEXT_PAIRS]
    np.testing.assert_array_equal(embedder(headless).embed(items), embedder(text_model).embed(items))


def test_a_tied_reranker_ignores_a_head_beside_its_embedding(vl_model: Path, tmp_path: Path) -> None:
    rows = torch.zeros_like(load_file(vl_model / "model.safetensors")["model.language_model.embed_tokens.weight"])
    stale = edited(vl_model, tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": rows}))
    assert rerank(stale).score(TEXT_PAIRS) == rerank(vl_model).score(TEXT_PAIRS)


def test_a_base_model_checkpoint_has_no_prefix(text_model: Path, tmp_path: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    items = [pair.document for pair in TEXT_PAIRS]
    bare = edited(text_model, tmp_path / "m", strip)
    np.testing.assert_array_equal(embedder(bare).embed(items), embedder(text_model).embed(items))


def declare(directory: Path, **fields: object) -> None:
    (directory / "1_LogitScore").mkdir()
    (directory / "1_LogitScore" / "config.json").write_text(json.dumps(fields))


def test_declared_answers_beat_the_tokenizers(vl_model: Path, tmp_path: Path) -> None:
    swapped = Path(shutil.copytree(vl_model, tmp_path / "m"))
    made = tiny.tokenizer()
    declare(swapped, true_token_id=made.token_to_id("no"), false_token_id=made.token_to_id("yes"))
    expected = [-score for score in rerank(vl_model).score(TEXT_PAIRS)]
    np.testing.assert_allclose(rerank(swapped).score(TEXT_PAIRS), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("yes", "no", "message"), [(5, None, "None; expected two"), (5, 99_999, "token 99999")])
def test_declared_answers_that_cannot_be_are_refused(
    vl_model: Path, tmp_path: Path, yes: int, no: int | None, message: str
) -> None:
    wrong = Path(shutil.copytree(vl_model, tmp_path / "m"))
    declare(wrong, true_token_id=yes, false_token_id=no)
    with pytest.raises(ModelError, match=message):
        rerank(wrong).score(TEXT_PAIRS)


def test_answers_of_several_tokens_are_refused(text_model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    wrong = Path(shutil.copytree(text_model, tmp_path / "m"))
    letters = Tokenizer(models.BPE({"y": 0, "e": 1, "s": 2, "n": 3, "o": 4}, []))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    letters.save(str(wrong / "tokenizer.json"))
    with pytest.raises(ModelError, match="splits 'yes' into 3 tokens"):
        rerank(wrong).score(TEXT_PAIRS)


def test_config_and_tokenizer_must_agree_on_the_picture_token(vl_model: Path, tmp_path: Path) -> None:
    wrong = Path(shutil.copytree(vl_model, tmp_path / "m"))
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "image_token_id": 3}))
    with pytest.raises(ModelError, match="image_token_id is 3"):
        rerank(wrong).score(TEXT_PAIRS)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_score_head_gives_its_logit_or_the_difference_of_two(tmp_path: Path, labels: int) -> None:
    from transformers import Qwen3ForSequenceClassification

    directory = tiny.write_text(tmp_path, labels=labels)
    model = Qwen3ForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    pair = TEXT_PAIRS[1]
    prompt = official.TEXT_RERANK.format(
        instruction=official.TEXT_RERANK_INSTRUCTION, query=prompt_of(pair.query), document=prompt_of(pair.document)
    )
    with torch.no_grad():
        logits = model(**official.inputs(directory, prompt)).logits[0]
    expected = logits[0] if labels == 1 else logits[1] - logits[0]
    assert rerank(directory).score([pair])[0] == pytest.approx(float(expected), abs=1e-4)


def test_the_row_that_says_yes_is_read_from_the_config() -> None:
    from qtool.scoring.transformers.model import score_row

    head = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert score_row(head, {}).tolist() == [-1, 1]
    assert score_row(head, {"id2label": {"0": "yes", "1": "no"}}).tolist() == [1, -1]
    assert score_row(head, {"classifier_from_token": ["yes", "no"]}).tolist() == [1, -1]
    with pytest.raises(ModelError, match="3 rows"):
        score_row(torch.zeros(3, 2), {})
