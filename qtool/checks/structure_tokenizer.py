"""A checkpoint's tokenizer as engines build it, against the reference's.

qtool and TEI go by tokenizer.json. transformers, vLLM and SGLang go by AutoTokenizer, which takes the vocabulary from
tokenizer.json, and the class, the added tokens and the rest from tokenizer_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, Final

from qtool.arch.prompts import PICTURE_TOKENS
from qtool.artefact import CheckpointArtefact
from qtool.checks.checkpoint_model import as_mapping
from qtool.checks.findings import Finding, Severity, finding, listed
from qtool.checks.loaders import TOKENIZER_FILES
from qtool.errors import ModelError
from qtool.extras import EXTRAS
from qtool.jsonfile import read_json

_TOKENIZER: Final = "tokenizer.json"
_CONFIG: Final = "tokenizer_config.json"

# Whether two tokenizer.json split every text into the same tokens; the order of keys and the spelling of merges do not
# matter.

_RULES: Final = ("normalizer", "pre_tokenizer", "post_processor")
_MARKS: Final = ("special", "lstrip", "rstrip", "normalized", "single_word")
_OFFSETS: Final = "trim_offsets"
_BYTE_LEVEL: Final = "ByteLevel"


def tokenizer_findings(target: object, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    """What keeps `found` from giving the ids that `expected` gives."""
    words, wanted = _vocabulary(found), _vocabulary(expected)
    problem = vocabulary_problem(list(words.items()), list(wanted.items())) or _merge_problem(found, expected)
    if problem:
        yield finding("other-tokenizer", target, problem=problem)
        return
    added, needed = _added(found), _added(expected)
    lost = [token for token, marks in needed.items() if added.get(token, {}).get("id") != marks["id"]]
    if lost:
        yield finding("added-token-missing", target, tokens=listed(lost))
        return
    parts = [part for part in _RULES if _rule(part, found.get(part)) != _rule(part, expected.get(part))]
    for part in parts or (["added_tokens"] if added != needed else []):
        yield finding("other-tokenizer-rules", target, part=part)
    yield from _model_findings(target, as_mapping(found.get("model")), as_mapping(expected.get("model")))
    for part, does in (("truncation", "cuts texts"), ("padding", "pads texts")):
        if found.get(part) is not None and found[part] != expected.get(part):
            yield finding("tokenizer-own-length", target, does=does, setting=f"{found[part]!r:.120}")


def vocabulary_problem(found: list[Any], expected: list[Any]) -> str:
    """How two vocabularies differ, or nothing; entries are compared as a whole."""
    if found == expected:
        return ""
    known = {str(entry) for entry in found}
    missing = [entry for entry in expected if str(entry) not in known]
    if not missing and len(found) == len(expected):
        missing = [e for f, e in zip(found, expected, strict=True) if f != e]
    if not missing:
        return f"it has {len(found):,} tokens; the reference has {len(expected):,}"
    return f"{len(missing):,} of {len(expected):,} tokens differ, such as {missing[0]}"


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = as_mapping(as_mapping(tokenizer.get("model")).get("vocab"))
    return dict(sorted(vocabulary.items(), key=lambda entry: str(entry[1])))


def _merge_problem(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    mine, theirs = _merges(found), _merges(expected)
    return "" if mine == theirs else f"its merge rules differ ({len(mine):,}; the reference has {len(theirs):,})"


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    merges = as_mapping(tokenizer.get("model")).get("merges")
    listed_merges = merges if isinstance(merges, list) else []
    return [" ".join(map(str, each)) if isinstance(each, list) else str(each) for each in listed_merges]


def _added(tokenizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The added tokens by their text."""
    added = tokenizer.get("added_tokens")
    tokens = [as_mapping(each) for each in added] if isinstance(added, list) else []
    return {str(t.get("content")): {"id": t.get("id"), **{mark: t.get(mark) for mark in _MARKS}} for t in tokens}


def _rule(part: str, value: Any) -> Any:
    """A rule without what moves no token: where a word begins, and what a byte-level post-processor has of its own."""
    if isinstance(value, list):
        return [_rule(part, each) for each in value]
    if not isinstance(value, Mapping):
        return value
    if part == "post_processor" and value.get("type") == _BYTE_LEVEL:
        return {"type": _BYTE_LEVEL}
    return {key: _rule(part, each) for key, each in value.items() if key != _OFFSETS}


def _model_findings(target: object, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    """The model's own switches, such as `dropout` or `byte_fallback`; null, false and nothing are one."""
    for key in dict.fromkeys((*expected, *found)):
        if key not in ("vocab", "merges") and (found.get(key) or None) != (expected.get(key) or None):
            yield finding("other-tokenizer-rules", target, part=f"model.{key}")


# tokenizer_config.json, by rules.

_PADDING: Final = "padding_side"
_SPECIAL: Final = ("truncation_side", "bos_token", "eos_token", "pad_token", "unk_token")
_SWITCHES: Final = ("split_special_tokens", "add_prefix_space", "fast_tokenizer_files")
"""What transformers' tokenizers take from the config and that changes ids."""
_ADDING: Final = ("add_bos_token", "add_eos_token")
_DEFAULTS: Final[Mapping[str, Any]] = {_PADDING: "right", "truncation_side": "right"}  # transformers'
_LARGEST: Final = 1 << 40
"""transformers writes 10³⁰ for "no limit"."""
_INERT: Final = 1 << 20
"""No model of the families reads as much, so that two larger limits are the same."""


def folder_tokenizer_findings(artefact: CheckpointArtefact, reference: CheckpointArtefact) -> Iterator[Finding]:
    """Everything by which some engine would split texts otherwise, or pad or cut them."""
    needed = (_TOKENIZER, _CONFIG)
    if any((reference.path / name).is_file() and not (artefact.path / name).is_file() for name in needed):
        return  # that it is missing is reported with the side files
    if _are_same(artefact, reference):
        return
    for each in (artefact, reference):
        each.fetch_side_files()
    findings = list(_by_rules(artefact, reference))
    yield from findings
    if not any(each.severity is Severity.BROKEN for each in findings) and not EXTRAS["score"].missing:
        yield from _by_ids(artefact, reference)


def _are_same(artefact: CheckpointArtefact, reference: CheckpointArtefact) -> bool:
    """Whether AutoTokenizer has the same to build from."""
    configs = [each.detection.config for each in (artefact, reference)]
    if any(configs[0].get(field) != configs[1].get(field) for field in ("model_type", "tokenizer_class", "auto_map")):
        return False
    return all(_is_same(artefact.path / name, reference.path / name) for name in TOKENIZER_FILES)


def _is_same(path: Path, other: Path) -> bool:
    """Byte for byte, or of JSON value for value but for the chat template, which is compared as engines take it."""
    files = [each.read_bytes() if each.is_file() else None for each in (path, other)]
    if files[0] == files[1] or None in files or path.suffix != ".json":
        return files[0] == files[1]
    values = [{**read_json(each), "chat_template": None} for each in (path, other)]
    return values[0] == values[1]


def _by_rules(artefact: CheckpointArtefact, reference: CheckpointArtefact) -> Iterator[Finding]:
    folder, theirs = artefact.path, reference.path
    if not (theirs / _TOKENIZER).is_file():
        return
    yield from tokenizer_findings(folder, artefact.tokenizer, reference.tokenizer)
    if (folder / _CONFIG).is_file() and (theirs / _CONFIG).is_file():
        found, expected = read_json(folder / _CONFIG), read_json(theirs / _CONFIG)
        yield from _declared_findings(folder, found, expected)
        yield from _class_findings(artefact, reference, found, expected)
        yield from _list_findings(folder, found, artefact.tokenizer)


def _declared_findings(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    sides = [each.get(_PADDING) or _DEFAULTS[_PADDING] for each in (found, expected)]
    if sides[0] != sides[1]:
        yield finding("other-padding-side", folder, found=str(sides[0]), expected=str(sides[1]), name=_CONFIG)
    for field in (*_SPECIAL, *_ADDING):
        values = [_content(each.get(field)) or _DEFAULTS.get(field) or None for each in (found, expected)]
        if values[0] != values[1]:
            yield finding("other-special-tokens", folder, field=field, found=str(values[0]), expected=str(values[1]))
    for field in _SWITCHES:
        if (found.get(field) or None) != (expected.get(field) or None):
            yield finding("other-tokenizer-rules", folder, part=f"{field} of {_CONFIG}")
    if "attention_mask" in _input_names(expected) and "attention_mask" not in _input_names(found):
        yield finding("other-attention-mask", folder, name=_CONFIG)
    yield from _picture_token_findings(folder, found, expected)
    limits = [_limit(each.get("model_max_length")) for each in (found, expected)]
    if limits[0] < min(limits[1], _INERT):
        facts = {"found": f"{limits[0]:,}", "expected": f"{limits[1]:,}" if limits[1] < _LARGEST else "no limit"}
        yield finding("other-truncation", folder, name=_CONFIG, **facts)
    elif limits[0] != limits[1] and min(limits) < _INERT:
        facts = {"found": str(found.get("model_max_length")), "expected": str(expected.get("model_max_length"))}
        yield finding("other-special-tokens", folder, field="model_max_length", **facts)


def _input_names(config: Mapping[str, Any]) -> Any:
    """What the tokenizer gives for a text; without a mask the model reads the padding of a batch."""
    names = config.get("model_input_names")
    return names if isinstance(names, list) else ("attention_mask",)


def _picture_token_findings(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    """Other names for the tokens that processors put in the place of pictures and videos."""
    for name, default in PICTURE_TOKENS.items():
        tokens = [_content(_named_tokens(each).get(name)) or default for each in (found, expected)]
        if tokens[0] != tokens[1]:
            facts = {"found": str(tokens[0]), "expected": str(tokens[1])}
            yield finding("other-token-ids", folder, field=f"{name} of {_CONFIG}", **facts)


def _named_tokens(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers/tokenization_utils_base.py, _from_pretrained: named tokens may stand in three places."""
    plain = {name: config[name] for name in PICTURE_TOKENS if name in config}
    extra = as_mapping(config.get("extra_special_tokens"))
    return {**plain, **extra} if plain or extra else as_mapping(config.get("model_specific_special_tokens"))


def _content(token: Any) -> Any:
    """The text of a special token, which may be written as an object; absent and null are the same."""
    return token.get("content") if isinstance(token, Mapping) else token


def _limit(value: Any) -> int:
    """The longest text in tokens. Raises ModelError for what is not a number; absent is unlimited."""
    if value is None:
        return _LARGEST
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, float) and isnan(value)):
        raise ModelError(f"{_CONFIG}: model_max_length is {value!r:.80}, expected a number.")
    return int(min(max(value, 0), _LARGEST))


def _class_findings(
    artefact: CheckpointArtefact, reference: CheckpointArtefact, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> Iterator[Finding]:
    """A class whose tokenizers are not the family's; those that take tokenizer.json as it is are as good."""
    sides = ((found, artefact), (expected, reference))
    names = [
        str(each.get("tokenizer_class") or side.detection.config.get("tokenizer_class") or "") for each, side in sides
    ]
    known = {*artefact.family.tokenizer.classes, "", names[1]}
    if names[0] not in known:
        yield finding("other-tokenizer-class", artefact.path, found=names[0], expected=names[1] or "none", name=_CONFIG)


def _list_findings(folder: Path, found: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Iterator[Finding]:
    """Where added_tokens_decoder contradicts the tokenizer.json beside it, which transformers then leaves unread."""
    declared = found.get("added_tokens_decoder")
    if declared is None:
        return
    if not isinstance(declared, Mapping):
        raise ModelError(f"{_CONFIG}: added_tokens_decoder is not an object.")
    added = {str(marks["id"]): (text, marks) for text, marks in _added(tokenizer).items()}
    for number, token in declared.items():
        entry = as_mapping(token)
        text, marks = added.get(number, ("", {}))
        if entry.get("content") != text or any(bool(entry.get(mark)) != bool(marks.get(mark)) for mark in _MARKS):
            yield finding("other-token-list", folder, token=str(entry.get("content")), name=_CONFIG)
            return
    lost = [text for number, (text, _) in added.items() if number not in declared]
    if lost:
        yield finding("other-token-list", folder, token=lost[0], name=_CONFIG)


# The ids themselves, from the real AutoTokenizer. It takes seconds to import and the tokenizer of a published model about
# one to build, so it is asked only where some file differs and no rule has found why that matters.

PROBES: Final = (
    "What is the capital of China?",
    "The quick brown fox jumps over the lazy dog; it's 3.14159, isn't it? WE'LL see, I'D say.",
    "  leading and trailing spaces,\ttabs\t\tand\n\nempty\r\nlines \n \n",
    "0123456789 42 1,000,000 2024-11-24 v1.2.3-rc4 0x7F ½ ²",
    "größer als naïve café — “quotes” … e\u0301 vs é",
    "红色的球在蓝色方块旁边。東京タワーはどこですか? 서울은 한국의 수도입니다.",
    "🔴🟦 👩‍👩‍👧 🇩🇪 ✌🏽 \u200d\u200b\ufeff",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "def f(x):\n    return {'a': [1, 2], \"b\": None}  # TODO: <tag attr='v'>&amp;</tag>",
    "<|im_start|>system\nyes or no<|im_end|>\n<|im_start|>user\n<Instruct>: x<Query>:y\n<Document>:z<|im_end|>\n",
    "<|vision_start|><|image_pad|><|video_pad|><|vision_end|><|endoftext|> <|endoftext|>a <think>\n\n</think>\n\n",
    "yes no Yes No YES NO yes\n no\n",
    "",
    " ".join(f"word{number} слово{number}" for number in range(500)),
)
"""Texts whose ids tell tokenizers apart; the last is longer than any limit that would be set by accident."""
_SHOWN: Final = 6


def _by_ids(artefact: CheckpointArtefact, reference: CheckpointArtefact) -> Iterator[Finding]:
    from qtool.scoring.transformers.tokenizer import read_auto_tokenizer

    tokens = list(_added(reference.tokenizer))
    probes = (*PROBES, "".join(tokens), " x ".join(tokens))
    expected = read_auto_tokenizer(reference.path).ids(probes)
    try:
        found = read_auto_tokenizer(artefact.path).ids(probes)
    except ModelError as error:
        yield finding("tokenizer-refused", artefact.path, problem=error.message, name=_CONFIG)
        return
    for text, mine, theirs in zip(probes, found, expected, strict=True):
        if mine != theirs:
            place = next(
                (n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
            )
            shown = [_ids(ids, place) for ids in (mine, theirs)]
            yield finding(
                "other-ids", artefact.path, text=repr(text[:40]), found=shown[0], expected=shown[1], name=_CONFIG
            )
            return


def _ids(ids: Sequence[int], place: int) -> str:
    """Some ids from where two lists differ."""
    begin = max(place - 1, 0)
    return f"[{', '.join(map(str, ids[begin : begin + _SHOWN]))}] at {begin:,} of {len(ids):,}"
