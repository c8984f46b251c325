"""Runtime faults that only scores show: each is named, with its cause, in the scores stage of a served model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qtool.arch.prompts import VL_EMBEDDER
from qtool.checks.stage import skipped
from qtool.errors import ModelError
from qtool.inputs.builtin import find_panel
from qtool.inputs.panels import load_panel
from qtool.reporting.run import verify
from qtool.scoring.scorer import log_odds, sigmoid
from qtool.verify import run, served
from qtool.verify.case import VerifyOptions
from qtool.verify.collect import PanelScores
from qtool.verify.faults import explained, rounded_scores, score_faults
from qtool.verify.gates import Verdict
from qtool.verify.report import Report
from qtool.verify.stages import check_prompts
from tests.scoring.servers import serving
from tests.verify import faulty

Answer = Callable[[str, Any], Any]


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter long texts, and no search for the prompt, which is another stage's."""
    monkeypatch.setattr(served, "_LONG", 200)
    monkeypatch.setattr(run, "check_prompts", lambda *_: skipped("prompt", "not tried here"))


def judged(answer: Answer, reference: str = "qtool-demo-reranker", **options: object) -> Report:
    chosen: dict[str, Any] = {"panels": ("demo-text",), "limit": 4, "noise_queries": 0, "device": "cpu", **options}
    with serving(answer) as server:
        return verify(VerifyOptions(artefact=server.url, reference=reference, **chosen))


def codes(report: Report) -> list[str]:
    """The findings of the scores stage."""
    (stage,) = (stage for stage in report.stages if stage.name == "scores")
    return [each.code for each in stage.findings]


@pytest.mark.parametrize("fault", faulty.RANKS)
def test_a_fault_of_a_rerankers_server_is_named_and_fails_the_scores(fault: str) -> None:
    rank, code = faulty.RANKS[fault]
    report = judged(faulty.serving_ranks(rank()))
    assert set(codes(report)) == {code}
    (stage,) = (stage for stage in report.stages if stage.name == "scores")
    assert (stage.outcome.value, report.verdict) == ("fail", Verdict.FAIL)
    assert stage.summary.startswith(stage.findings[0].sentence)


@pytest.mark.parametrize("rank", [lambda: faulty.right, faulty.noisy], ids=["exact", "bf16"])
def test_a_healthy_server_has_no_fault(rank: Callable[[], faulty.Rank]) -> None:
    report = judged(faulty.serving_ranks(rank()))
    assert codes(report) == []
    assert next(stage.outcome.value for stage in report.stages if stage.name == "scores") == "pass"


def test_wrong_weights_are_not_taken_for_a_fault_of_the_runtime() -> None:
    report = judged(faulty.serving_ranks(faulty.damaged))
    assert (codes(report), report.verdict) == ([], Verdict.FAIL)


def test_a_prompt_of_one_token_is_the_cause_of_one_score_where_the_server_tells_it() -> None:
    answer = faulty.serving_ranks(lambda _, documents: [0.4494] * len(documents), usage={"prompt_tokens": 1})
    report = judged(answer)
    assert codes(report) == ["served-one-token"]
    (stage,) = (stage for stage in report.stages if stage.name == "scores")
    assert "reads 1 token of a prompt of more than" in stage.findings[0].sentence


def test_scores_of_another_scale_are_not_said_to_fit_the_official_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "check_prompts", check_prompts)
    report = judged(
        faulty.serving_ranks(lambda query, documents: faulty.sigmoids(faulty.right(query, documents))), limit=3
    )
    (stage,) = (stage for stage in report.stages if stage.name == "prompt")
    assert ([each.code for each in stage.findings], stage.summary) == (
        ["prompt-unknown"],
        "4 pairs fit no known prompt.",
    )
    assert codes(report) == ["scores-activated-twice"]


def test_a_score_that_no_known_scale_explains_stays_an_error() -> None:
    answer = faulty.serving_ranks(lambda query, documents: 5 + np.cos(40 * faulty.log_odds(query, documents)))
    with pytest.raises(ModelError, match="is not a probability, so its scale is unknown"):
        judged(answer)


def test_vllm_is_asked_with_and_without_its_prefix_cache() -> None:
    def warm(query: str, documents: list[str], salt: str | None) -> np.ndarray:
        scores = faulty.log_odds(query, documents)
        return scores if salt else 0.1 * scores - 1

    report = judged(faulty.vllm(warm))
    assert codes(report) == ["served-warm-prefix"]
    (finding,) = next(stage.findings for stage in report.stages if stage.name == "scores")
    assert "Start vLLM with --no-enable-prefix-caching" in finding.sentence
    healthy = judged(faulty.vllm(lambda query, documents, _: faulty.log_odds(query, documents)))
    assert codes(healthy) == []


def test_a_template_without_a_place_for_instructions_is_a_warning_until_the_panel_has_one(tmp_path: Any) -> None:
    answer = faulty.vllm(lambda query, documents, _: faulty.log_odds(query, documents), instructed=False)
    report = judged(answer)
    assert codes(report) == ["served-ignores-instructions"]
    assert report.verdict is not Verdict.FAIL
    panel = tmp_path / "p.jsonl"
    panel.write_text('{"query": "red", "instruction": "By colour.", "documents": ["a red ball", "a blue cube"]}\n')
    assert codes(judged(answer, panels=(str(panel),))) == ["served-no-instruction"]


def test_an_activation_of_vllm_that_is_no_sigmoid_of_its_log_odds_is_named() -> None:
    def twice(path: str, body: Any) -> Any:
        found = faulty.vllm(lambda query, documents, _: faulty.log_odds(query, documents))(path, body)
        if path == "/score" and body and "use_activation" not in body:
            found["data"] = [{**each, "score": sigmoid(each["score"])} for each in found["data"]]
        return found

    assert codes(judged(twice)) == ["scores-activated-twice"]


def test_tei_that_activates_what_was_asked_raw_is_named() -> None:
    def tei(*, activates: bool) -> Answer:
        def answer(path: str, body: Any) -> Any:
            if path == "/info":
                return {"model_id": "m", "version": "1.9", "model_type": {"reranker": {}}}
            if path != "/rerank" or not body:
                return None
            query = body["query"].rpartition("<Query>:")[2].partition("\n")[0]
            documents = [text.partition("<|im_end|>")[0] for text in body["texts"]]
            scores = faulty.right(query, documents) if activates else faulty.log_odds(query, documents)
            return [{"index": place, "score": float(score)} for place, score in enumerate(scores)]

        return answer

    assert codes(judged(tei(activates=True))) == ["served-activated"]
    assert codes(judged(tei(activates=False))) == []


# Embedders.


def moved(text: str, by: int) -> tuple[float, ...]:
    vector = np.roll(np.array(faulty.vectors_of(text)), by)
    return tuple(vector.tolist())


def counting() -> Callable[[str], Any]:
    """A vector that changes once its text was asked before."""
    seen: set[str] = set()

    def vector(text: str) -> Any:
        was_seen = text in seen
        seen.add(text)
        return moved(text, 1) if was_seen else faulty.vectors_of(text)

    return vector


VECTORS: dict[str, tuple[Callable[[], Callable[[str], Any]], str]] = {
    "length 2": (lambda: lambda text: 2 * np.array(faulty.vectors_of(text)), "served-not-normalized"),
    "three decimals": (lambda: lambda text: np.round(faulty.vectors_of(text), 3), "scores-rounded"),
    "one vector": (lambda: lambda _: faulty.vectors_of("red"), "scores-constant"),
    "warm cache": (counting, "served-changes"),
    "mean pooling": (lambda: lambda text: faulty.vectors_of(text, "mean of all tokens"), "served-pooling"),
    "no instruction": (lambda: uninstructed, "served-other-prompt"),
    "end cut": (lambda: lambda text: faulty.vectors_of(cut(text)), "served-truncated"),
}


def uninstructed(text: str) -> Any:
    template = VL_EMBEDDER.template.replace("<|im_start|>system\n{instruction}<|im_end|>\n", "")
    return faulty.vector_under(replace(VL_EMBEDDER, template=template), faulty.parsed(text)[1])


def cut(text: str) -> str:
    before, content, after = text.partition("<|im_start|>user\n")
    inside, end, rest = after.partition("<|im_end|>")
    return f"{before}{content}{faulty.words(inside, first=60)}{end}{rest}"


@pytest.mark.parametrize("fault", VECTORS)
def test_a_fault_of_an_embedders_server_is_named(fault: str) -> None:
    vector, code = VECTORS[fault]
    report = judged(faulty.serving_vectors(vector()), "qtool-demo-embedder", limit=3)
    assert codes(report) == [code]
    assert report.verdict is Verdict.FAIL


def test_a_healthy_embedders_server_has_no_fault() -> None:
    report = judged(faulty.serving_vectors(faulty.vectors_of), "qtool-demo-embedder", limit=3)
    assert (codes(report), report.panels[0].metrics["cosine_min"]) == ([], pytest.approx(1))


def test_vectors_that_are_other_items_are_named() -> None:
    texts: list[str] = []

    def vector(text: str) -> Any:
        if text not in texts:
            texts.append(text)
        place = texts.index(text)
        return faulty.vectors_of(texts[place - 1] if place else text)

    report = judged(faulty.serving_vectors(vector), "qtool-demo-embedder", limit=3, concurrency=1)
    assert codes(report) == ["scores-exchanged"]


# What scores alone prove, whatever the noise of a quantized model.


FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "softmax twice": (lambda scores: np.tanh(scores / 2), "scores-activated-twice"),
    "temperature": (lambda scores: scores / 2, "scores-scaled"),
    "half the range": (lambda scores: logits((faulty.sigmoids(scores) + 1) / 2), "scores-rescaled"),
    "four decimals": (lambda scores: logits(np.round(faulty.sigmoids(scores), 4)), "scores-rounded"),
    "one decimal of log-odds": (lambda scores: np.round(scores, 1), "scores-rounded"),
    "clipped": (lambda scores: np.clip(scores, -3, 3), "scores-clipped"),
}


def logits(probabilities: np.ndarray) -> np.ndarray:
    return np.array([log_odds(each) for each in probabilities.tolist()])


@pytest.mark.parametrize("fault", FUNCTIONS)
def test_scores_that_are_a_function_of_the_right_ones_are_named(fault: str) -> None:
    function, code = FUNCTIONS[fault]
    panel = load_panel(find_panel("demo-text")).first(20)
    reference = np.random.default_rng(1).normal(-1, 3, len(panel.pairs))
    sides = [(panel, PanelScores(reference), PanelScores(function(reference)))]
    assert {each.code for each in score_faults("x", sides)} == {code}


@pytest.mark.parametrize(
    ("scale", "code"),
    [
        (lambda scores: -np.logaddexp(0, scores), "scores-reversed"),
        (lambda scores: 2 * faulty.sigmoids(scores) - 1, "served-rescaled"),
    ],
    ids=["log-probabilities of no", "from -1 to 1"],
)
def test_a_scale_that_is_no_probability_is_named(scale: Callable[[np.ndarray], np.ndarray], code: str) -> None:
    report = judged(faulty.serving_ranks(lambda query, documents: scale(faulty.log_odds(query, documents))))
    assert codes(report) == [code]


@pytest.mark.parametrize("seed", range(20))
def test_a_quantized_model_has_no_fault_and_a_fault_is_seen_through_its_noise(seed: int) -> None:
    random = np.random.default_rng(seed)
    reference = random.normal(random.uniform(-4, 1), random.uniform(1, 4), 400)
    noisy = reference + random.normal(0, 0.25, 400)
    assert [*explained("x", reference, noisy), *rounded_scores("x", noisy)] == []
    worse = 0.8 * reference + random.normal(0, 1.5, 400)
    assert [*explained("x", reference, worse), *rounded_scores("x", worse)] == []
    half = np.round(noisy.astype(np.float16).astype(float), 6)  # 16-bit log-odds have few digits, but binary ones
    assert list(rounded_scores("x", half)) == []
    assert [each.code for each in explained("x", reference, -noisy)] == ["scores-reversed"]


def test_nothing_scored_has_no_fault() -> None:
    assert list(score_faults("x", [])) == []
