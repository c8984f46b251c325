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
COMMAND = re.compile(r"(^|: |`)(pip install|uv |hf |qtool |llama-|make )|: \{repair_command\}")

MESSAGES = list(messages())
FINDINGS = [(code, text) for code, (sentence, remedy) in findings().items() for text in (sentence, remedy) if text]


def as_shown(text: str) -> str:
    """The text with its values marked as the page marks them, in a log's message too."""
    return text.replace("%s", "{value}")


def name_of(message: Message) -> str:
    return f"{message.module}: {message.texts[0][:50]}"


def test_the_page_is_fresh():
    assert PAGE.read_text() == page(), "run `make docs`"


@pytest.mark.parametrize("message", MESSAGES, ids=name_of)
def test_a_message_is_a_plain_sentence(message):
    for text in map(as_shown, message.texts):
        assert START.match(text), text
        assert END.search(text), text
        assert not FORBIDDEN.search(text), text


@pytest.mark.parametrize("message", [each for each in MESSAGES if each.hints], ids=name_of)
def test_a_hint_is_a_plain_sentence_or_a_command(message):
    for hint in message.hints:
        assert START.match(hint) or COMMAND.match(hint), hint
        assert END.search(hint) or COMMAND.search(hint), hint
        assert not FORBIDDEN.search(hint), hint


@pytest.mark.parametrize(("code", "text"), FINDINGS)
def test_a_finding_is_a_plain_sentence_or_a_command(code, text):
    assert START.match(text) or COMMAND.match(text), code
    assert END.search(text) or COMMAND.search(text), code
    assert not FORBIDDEN.search(text), code


def test_the_extractor_sees_variants_constants_and_variables():
    found = {text for message in messages() for text in message.texts}
    assert "Not a local folder or a Hub repository: '{model}'." in found
    assert {"llama.cpp cannot load {gguf}.", "llama.cpp cannot load {gguf} with {mmproj}."} <= found
    assert "{where}: labels: The header declares '{header.labels}'; the documents are '{found}'." in found
    assert all(sentence for sentence, _ in findings().values())
