"""A checkpoint's tokenizer, read from `tokenizer.json` without transformers.

Its ids equal those of the transformers tokenizer of the same folder, also for special tokens inside user text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qtool.errors import ModelError, UsageError
from qtool.jsonfile import read_json

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")


class PromptTokenizer:
    """Text to ids, and what prompts and heads need of the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        # tokenizer.json may contain padding and truncation from training; transformers ignores them too.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.special_ids = special_ids

    @classmethod
    def read(cls, directory: Path) -> PromptTokenizer:
        """The tokenizer in `directory`."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"tokenizer.json is missing from {directory}.")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the Rust side raises bare Exception, and panics as no Exception at all
            raise ModelError(f"Cannot read the tokenizer {path}: {error}.") from error
        return cls(tokenizer, _special_ids(tokenizer, directory))

    def encode(self, text: str) -> list[int]:
        """The ids of a whole prompt, with what the tokenizer itself appends, as in the official code."""
        try:
            ids: list[int] = self._tokenizer.encode(text).ids
        except (TypeError, UnicodeError) as error:  # not a str, or with a lone surrogate
            raise UsageError(f"Invalid text {text!a:.80}: expected str without lone surrogates.") from error
        return ids

    def text(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included; ids that it does not have are left out."""
        size = self._tokenizer.get_vocab_size()
        return str(self._tokenizer.decode([each for each in ids if each < size], skip_special_tokens=False))

    def appends(self, token: str) -> bool:
        """Whether the tokenizer itself appends `token` to every text."""
        return self.encode("")[-1:] == [self.token_id(token)]

    def token_id(self, token: str) -> int:
        """The id of a token. Raises ModelError where the vocabulary does not have it."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ModelError(f"The tokenizer has no token {token!r}.")
        return int(found)

    def word_id(self, word: str) -> int:
        """The id of a word that must be one token, such as a reranker's answer. Raises ModelError."""
        ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ModelError(f"The tokenizer splits {word!r} into {len(ids)} tokens; the rank head needs it to be one.")
        return ids[0]


def _special_ids(tokenizer: Tokenizer, directory: Path) -> frozenset[int]:
    """`all_special_ids` of transformers: the declared tokens, or if there are none those flagged as special."""
    config = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    if any(config.get(field) for field in _LISTED):
        ids = (tokenizer.token_to_id(token) for token in _declared(config))
        return frozenset(found for found in ids if found is not None)
    return frozenset(found for found, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _declared(config: Mapping[str, Any]) -> list[str]:
    """The texts of all special tokens. Raises ModelError for what is none."""
    tokens: list[tuple[str, Any]] = [(field, config.get(field)) for field in _NAMED]
    for field in _LISTED:
        listed = config.get(field) or ()
        several = [*listed.values()] if isinstance(listed, Mapping) else listed
        if not isinstance(several, list | tuple):
            raise ModelError(f"tokenizer_config.json: {field} is {several!r:.80}, expected a list of tokens.")
        tokens.extend((field, each) for each in several)
    return [_text_of(field, token) for field, token in tokens if token]


def _text_of(field: str, token: Any) -> str:
    """The text of a special token, which may be written as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str) or (not text.isprintable() and any(0xD800 <= ord(each) < 0xE000 for each in text)):
        raise ModelError(f"tokenizer_config.json: {field} is {token!a:.80}, expected a token.")
    return text
