"""Messages are complete sentences in plain words, and tests/messages.txt shows all of them on one page."""

from __future__ import annotations

import re

import pytest

from tests.messages import PAGE, Message, findings, messages, page

# Phrases of messages that had to be read twice: "'x' is no size", "--texts stands alone", "vectors are asked of it".
FORBIDDEN = re.compile(
    r"(?<!there )\b(is|are|was) no\b(?! longer)|\bis none\b|\bstands?\b|\blies?\b|\bnobody\b|\bwhoever\b|\basked of\b"
    r"|\btold\b|\btells?\b|\bheard\b|\brooms?\b|\bhouse\b|\bcrowd\b|\bmeant so\b|\banew\b|\bmend\b|\bfalls? apart\b"
    r"|\bgo together\b|\bwould have it\b|\bnowhere\b|\bneed be\b|\bto be asked\b|\bturned otherwise\b",
    re.IGNORECASE,
)
START = re.compile(r"[A-Z0-9`'\"{<-]|[a-z_]*[._/-][a-z]|[a-z]+_|(fps|limit|qtool|transformers|vLLM) ")
END = re.compile(r"[.?:`}]$")
COMMAND = re.compile(r"(^|: |`)(pip install|uv |hf |qtool |llama-|make )")

# Modules with messages that are still to be rewritten (`python -m tests.test_messages` lists them).
UNCHECKED = (
    "qtool/checks/",
    "qtool/export/quantize_plan.py",
    "qtool/scoring/ledger.py",
    "qtool/scoring/llama_cpp/model.py",
    "qtool/scoring/remembering.py",
    "qtool/scoring/runtime.py",
    "qtool/serve_command.py",
    "qtool/storage/checkpoint.py",
    "qtool/storage/gguf.py",
    "qtool/storage/location.py",
    "qtool/verify/",
)
CHECKED = [message for message in messages() if not message.module.startswith(UNCHECKED)]


def name_of(message: Message) -> str:
    return f"{message.module}: {message.texts[0][:50]}"


def test_the_page_is_fresh():
    assert PAGE.read_text() == page(), "run `make docs`"


@pytest.mark.parametrize("message", CHECKED, ids=name_of)
def test_a_message_is_a_plain_sentence(message):
    for text in message.texts:
        assert START.match(text), text
        assert END.search(text), text
        assert not FORBIDDEN.search(text), text


@pytest.mark.parametrize("message", [each for each in CHECKED if each.hints], ids=name_of)
def test_a_hint_is_a_plain_sentence_or_a_command(message):
    for hint in message.hints:
        assert START.match(hint) or COMMAND.match(hint), hint
        assert END.search(hint) or COMMAND.search(hint), hint
        assert not FORBIDDEN.search(hint), hint


def test_the_extractor_sees_variants_constants_and_variables():
    found = {text for message in messages() for text in message.texts}
    assert "Not a local folder or a Hub repository: '{model}'." in found
    assert {"llama.cpp cannot load {gguf}.", "llama.cpp cannot load {gguf} with {mmproj}."} <= found
    assert "{where}: labels: The header declares '{header.labels}'; the documents are '{found}'." in found
    assert all(sentence for sentence, _ in findings().values())


if __name__ == "__main__":  # what is left to rewrite: `python -m tests.test_messages`
    for each in messages():
        for text in (*each.texts, *each.hints):
            is_fine = (START.match(text) or COMMAND.match(text)) and (END.search(text) or COMMAND.search(text))
            if not is_fine or FORBIDDEN.search(text):
                print(f"{each.module}: {text}")  # noqa: T201 - the result of the program
    for code, (sentence, _) in findings().items():
        if not (START.match(sentence) and END.search(sentence)) or FORBIDDEN.search(sentence):
            print(f"finding {code}: {sentence}")  # noqa: T201
