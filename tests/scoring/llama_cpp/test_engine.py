"""The engine as a guest in this process: what it prints, catches and leaves behind."""

from __future__ import annotations

import signal
import sys
import threading
from functools import partial

import numpy as np
import pytest

from qtool.errors import SetupError
from qtool.scoring.llama_cpp.runtime import open_llama_cpp
from qtool.scoring.scorer import log_odds
from tests.scoring.gguf_files import gguf_of, projector_of
from tests.scoring.llama_cpp.shared import (
    ALONE,
    PICTURES,
    RERANKER,
    TEXT,
)


def test_nothing_reaches_standard_output_and_a_closed_scorer_opens_again(folder, capfd):
    scorer = open_llama_cpp(gguf_of(RERANKER, "f32", folder), projector_of(RERANKER, folder), ALONE)
    pairs = [TEXT.pairs[0], PICTURES.pairs[0]]
    before = scorer.score(pairs)
    scorer.close()
    scorer.close()
    assert scorer.score(pairs) == before
    scorer.close()
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_stays_pythons(folder):
    def interrupted():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    with open_llama_cpp(gguf_of(RERANKER, "f16", folder), options=ALONE) as scorer:
        # From a thread, where Python itself could not put the handler back.
        worker = threading.Thread(target=partial(scorer.score, TEXT.pairs[:1]))
        worker.start()
        worker.join()
        interrupted()
    interrupted()


def test_without_the_engine_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SetupError, match="xllamacpp") as caught:
        open_llama_cpp(gguf_of(RERANKER, "f32", folder))
    assert caught.value.hint == "Run `pip install 'qtool-retrieval[llamacpp]'`."


def test_log_odds_are_exact_and_finite():
    assert log_odds(0.5) == 0
    assert log_odds(0.75) == pytest.approx(np.log(3), abs=1e-15)
    assert log_odds(0.0) == pytest.approx(-103.3, abs=0.1)
    assert log_odds(1.0) == pytest.approx(17.3, abs=0.1)
