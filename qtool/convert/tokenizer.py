"""The tokenizer of a checkpoint as GGUF metadata.

Rule: only what tokenizer.json and tokenizer_config.json declare; a pre-tokenizer that is not Qwen2's is refused, since
llama.cpp would split text otherwise than the model was trained with, and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gguf.constants import TokenType

from qtool.errors import ModelError
from qtool.gguf_file.values import Kind, Value, array, boolean, string, uint32
from qtool.jsonfile import read_json

QWEN2_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern for which llama.cpp's pre-tokenizer `qwen2` stands."""

_ID_KEYS: Final = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelt so in llama.cpp
    "pad": "padding_token_id",
}


def read_tokenizer(directory: Path) -> Mapping[str, Any]:
    """tokenizer.json, which is large enough to be read only once."""
    tokenizer: Mapping[str, Any] = read_json(directory / "tokenizer.json")
    return tokenizer


def tokenizer_metadata(directory: Path, tokenizer: Mapping[str, Any], vocab_size: int) -> Mapping[str, Value]:
    """The `tokenizer.*` fields, chat templates excepted; `vocab_size` rows has the embedding."""
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ModelError(f"{directory / 'tokenizer.json'} holds no BPE model.")
    _require_qwen2(directory, tokenizer)
    tokens, kinds = _tokens(directory, tokenizer, vocab_size)
    settings = read_json(directory / "tokenizer_config.json") if _has(directory, "tokenizer_config.json") else {}
    fields = {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string("qwen2"),
        "tokenizer.ggml.tokens": array(Kind.STRING, tokens),
        "tokenizer.ggml.token_type": array(Kind.INT32, kinds),
        "tokenizer.ggml.merges": array(Kind.STRING, map(_merge, model["merges"])),
    }
    return fields | dict(_special_tokens(directory, tokenizer, settings))


def token_id(tokenizer: Mapping[str, Any], text: str) -> int:
    """The id of a text that is one token of the vocabulary."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if text not in vocabulary:
        raise ModelError(f"tokenizer.json has no single token {text!r}: the model cannot answer with it.")
    return int(vocabulary[text])


def _has(directory: Path, name: str) -> bool:
    return (directory / name).is_file()


def _require_qwen2(directory: Path, tokenizer: Mapping[str, Any]) -> None:
    split = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    patterns = [step.get("pattern", {}).get("Regex") for step in split if step.get("type") == "Split"]
    if patterns != [QWEN2_SPLIT] or split[-1].get("type") != "ByteLevel":
        raise ModelError(
            f"{directory / 'tokenizer.json'} splits text otherwise than Qwen2's pre-tokenizer does.",
            "llama.cpp has no name for it, and would score other tokens than the model knows.",
        )


def _steps(declared: Any, several: str) -> list[Mapping[str, Any]]:
    """The members of a sequence, or the one step there is."""
    if not isinstance(declared, dict):
        return [{}]
    return list(declared.get(several) or [declared])


def _tokens(directory: Path, tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Token of each id and its type; ids that no token has are padding of the embedding."""
    added = {token["id"]: token for token in tokenizer.get("added_tokens", ())}
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts) >= vocab_size:
        raise ModelError(
            f"{directory / 'tokenizer.json'} has the token id {max(texts):,}; the embedding has {vocab_size:,} rows."
        )
    tokens, kinds = [], []
    for number in range(vocab_size):
        tokens.append(texts.get(number, f"[PAD{number}]"))
        kinds.append(_kind(tokens[-1], number in texts, added.get(number)))
    return tokens, kinds


def _kind(text: str, is_used: bool, added: Mapping[str, Any] | None) -> int:  # noqa: FBT001 - one of three facts
    if not is_used:
        return int(TokenType.UNUSED)
    if added is None:
        return int(TokenType.NORMAL)
    looks_special = text.startswith("<|") and text.endswith("|>")  # Qwen leaves some of these unmarked
    return int(TokenType.CONTROL if added["special"] or looks_special else TokenType.USER_DEFINED)


def _merge(pair: str | Sequence[str]) -> str:
    if isinstance(pair, str):
        return pair
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)  # GPT-2's letter for a space


def _special_tokens(
    directory: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[str, Value]]:
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    named = {kind: _content(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "sep", "pad")}
    adds = {kind: bool(settings[f"add_{kind}_token"]) for kind in ("bos", "eos") if _declares(settings, kind)}
    appended = _appended_token(tokenizer)
    if any(step.get("type") == "ByteLevel" for step in _steps(tokenizer.get("post_processor"), "processors")):
        adds = {"bos": False, "eos": False}
    if appended and appended != named["eos"]:  # Qwen3-Embedding ends with <|endoftext|>, chats with <|im_end|>
        named |= {"eot": named["eos"], "eos": appended}
    if appended:
        adds["eos"] = True
    numbers = {kind: ids[text] for kind, text in named.items() if text in ids}
    for kind, number in (_numbers_of_config(directory) | numbers).items():
        yield f"tokenizer.ggml.{_ID_KEYS[kind]}", uint32(number)
    for kind, flag in adds.items():
        yield f"tokenizer.ggml.add_{kind}_token", boolean(flag)


def _content(declared: Any) -> str | None:
    """The text of a special token, which may be written as an object."""
    return declared.get("content") if isinstance(declared, dict) else declared


def _declares(settings: Mapping[str, Any], kind: str) -> bool:
    return isinstance(settings.get(f"add_{kind}_token"), bool)


def _appended_token(tokenizer: Mapping[str, Any]) -> str | None:
    """What the tokenizer puts behind every text of its own."""
    for step in _steps(tokenizer.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing":
            last = (step.get("single") or [{}])[-1]
            token = last.get("SpecialToken", {}).get("id")
            return str(token) if token else None
    return None


def _numbers_of_config(directory: Path) -> dict[str, int]:
    """Ids that config.json states, for kinds that the tokenizer does not name."""
    config = read_json(directory / "config.json")
    text = config.get("text_config", {})
    found = {kind: config.get(f"{kind}_token_id", text.get(f"{kind}_token_id")) for kind in ("bos", "eos", "pad")}
    return {kind: number for kind, number in found.items() if isinstance(number, int)}
