"""The metadata of a GGUF file: model, prompt, tokenizer, vision projector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from gguf.constants import GGML_QUANT_VERSION, GGUFValueType, PoolingType, TokenType
from gguf.utility import size_label

from qtool.arch.detect import Detection
from qtool.arch.families import UPSTREAM_RERANKER
from qtool.arch.family import Family, TokenizerSpec
from qtool.arch.prompts import NO, YES, PromptSpec
from qtool.arch.spec import Config, Task, as_json, dimension, layers, real_number
from qtool.errors import ModelError, UsageError, reason
from qtool.jsonfile import read_json
from qtool.storage.gguf import Value, array, boolean, float32, int32, string, uint32

# The language model. Keys, types and values are those of llama.cpp's own converter; what config.json declares and GGUF
# cannot express is an error.

_PLAIN_ROPE: Final = ("default", None)


@dataclass(frozen=True)
class Origin:
    """Where a file comes from; `repository` is its page on the Hub, if any."""

    name: str
    repository: str | None = None


def general_metadata(architecture: str, kind: str, origin: Origin, parameters: int, file_type: int) -> dict[str, Value]:
    """The `general.*` fields; `parameters` counts the values of all tensors."""
    fields = {
        "general.architecture": string(architecture),
        "general.type": string(kind),
        "general.name": string(origin.name),
        "general.size_label": string(size_label(parameters, parameters, 0, 0)),
        "general.file_type": uint32(file_type),
        "general.quantization_version": uint32(GGML_QUANT_VERSION),
    }
    return fields | ({"general.source.url": string(origin.repository)} if origin.repository else {})


_SAMPLING: Final = {
    "top_k": ("top_k", int32),
    "top_p": ("top_p", float32),
    "min_p": ("min_p", float32),
    "temperature": ("temp", float32),
    "repetition_penalty": ("penalty_repeat", float32),
}


def sampling_metadata(directory: Path) -> dict[str, Value]:
    """The sampling parameters of generation_config.json, which llama.cpp's converter writes; no ranker needs them."""
    path = directory / "generation_config.json"
    declared = read_json(path) if path.is_file() else {}
    present = [(key, *made) for key, made in _SAMPLING.items() if key in declared]
    named = {field: _made(make, declared[key], f"{path.name}: {key}") for key, field, make in present}
    return {f"general.sampling.{field}": value for field, value in named.items()}


def _made(make: Callable[[Any], Value], value: Any, place: str) -> Value:
    """A field of a value that a file declares. Raises ModelError with the place where it stands."""
    try:
        return make(value)
    except ModelError as error:
        raise ModelError(f"{place}: {error.message}") from None


def decoder_metadata(family: Family, text: Config) -> dict[str, Value]:
    """Sizes, rotary embedding and norm of the decoder that `text`, the text config, describes."""
    return {f"{family.gguf_architecture}.{key}": value for key, value in decoder_fields(family, text).items()}


def decoder_fields(family: Family, text: Config) -> dict[str, Value]:
    """The same by the keys without the architecture's name."""
    if text.get("is_causal") is False:
        raise ModelError(
            f"config.json: is_causal is false; expected causal attention, as in the published {family.name} models."
        )
    head_dim = dimension(text, "head_dim", family.default_head_dim)
    return {
        "block_count": uint32(dimension(text, "num_hidden_layers")),
        "context_length": uint32(dimension(text, "max_position_embeddings")),
        "embedding_length": uint32(dimension(text, "hidden_size")),
        "feed_forward_length": uint32(dimension(text, "intermediate_size")),
        "attention.head_count": uint32(dimension(text, "num_attention_heads")),
        "attention.head_count_kv": uint32(dimension(text, "num_key_value_heads")),
        "attention.layer_norm_rms_epsilon": float32(real_number(text, "rms_norm_eps", 1e-6)),
        "attention.key_length": uint32(head_dim),
        "attention.value_length": uint32(head_dim),
        **dict(_rope_fields(family, text)),
    }


def _rope_fields(family: Family, text: Config) -> Iterator[tuple[str, Value]]:
    rope: Any = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"config.json: The rotary embedding is {as_json(rope)}, expected an object.")
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _PLAIN_ROPE:
        raise ModelError(f"config.json: The type of rotary embedding is {kind!r:.80}; expected 'default'.")
    if "mrope_section" in rope:
        declared = rope["mrope_section"]
        if not isinstance(declared, list) or not all(type(each) is int for each in declared):
            raise ModelError(f"config.json: mrope_section is {as_json(declared)}, expected a list of integers.")
        sections = [*declared, 0, 0, 0, 0][:4]
        yield "rope.dimension_sections", array(GGUFValueType.INT32, sections)
    yield "rope.freq_base", float32(real_number({**text, **rope}, "rope_theta", family.rope.default_theta))


def task_metadata(architecture: str, task: Task) -> dict[str, Value]:
    """How llama.cpp pools: by the rank head with two labels for a reranker, at the last token for an embedder."""
    if task is Task.EMBED:
        return {f"{architecture}.pooling_type": uint32(int(PoolingType.LAST))}
    return {
        f"{architecture}.pooling_type": uint32(int(PoolingType.RANK)),
        f"{architecture}.classifier.output_labels": array(GGUFValueType.STRING, [YES, NO]),
    }


def deepstack_metadata(architecture: str, vision: Config) -> dict[str, Value]:
    """The number of the decoder's first layers with a deepstack input."""
    return {f"{architecture}.n_deepstack_layers": uint32(len(layers(vision, "deepstack_visual_indexes")))}


# The vision projector, as llama.cpp's own converter writes it.

_PREPROCESSORS: Final = ("processor_config.json", "preprocessor_config.json")


def vision_metadata(detection: Detection, directory: Path) -> dict[str, Value]:
    """The `clip.*` fields for a checkpoint's config and the image processor's files in `directory`."""
    vision, text, tower = detection.vision, detection.text, detection.family.vision
    if tower is None:
        raise ModelError(f"{detection.architecture.name} has no vision tower.")
    if dimension(vision, "temporal_patch_size", 2) != 2:
        raise ModelError("config.json: temporal_patch_size is not 2; llama.cpp supports only 2.")
    patch, positions = dimension(vision, "patch_size", 16), dimension(vision, "num_position_embeddings")
    depth = dimension(vision, "depth")
    deepstack = layers(vision, "deepstack_visual_indexes")
    mean, spread = (_statistics(directory, name) for name in ("image_mean", "image_std"))
    vision_fields = {
        "projection_dim": uint32(dimension(text, "hidden_size")),
        "image_size": uint32(int(positions**0.5 * patch)),
        "patch_size": uint32(patch),
        "embedding_length": uint32(dimension(vision, "hidden_size")),
        "feed_forward_length": uint32(dimension(vision, "intermediate_size")),
        "block_count": uint32(depth),
        "attention.head_count": uint32(dimension(vision, "num_heads")),
        "image_mean": array(GGUFValueType.FLOAT32, mean),
        "image_std": array(GGUFValueType.FLOAT32, spread),
        "spatial_merge_size": uint32(dimension(vision, "spatial_merge_size", 2)),
        "attention.layer_norm_epsilon": float32(real_number(text, "rms_norm_eps", 1e-6)),
        "is_deepstack_layers": array(GGUFValueType.BOOL, [layer in deepstack for layer in range(depth)]),
    }
    return {
        "clip.has_vision_encoder": boolean(True),
        "clip.projector_type": string(tower.projector_type),
        "clip.use_gelu": boolean(True),
        **{f"clip.vision.{key}": value for key, value in vision_fields.items()},
    }


def _statistics(directory: Path, name: str) -> list[float]:
    """Mean or standard deviation of the pixel values, from whichever file declares it."""
    for file_name in _PREPROCESSORS:
        if (directory / file_name).is_file():
            declared: Any = read_json(directory / file_name)
            own = declared.get("image_processor", declared)
            values = own.get(name) if isinstance(own, Mapping) else None
            if isinstance(values, list) and len(values) == 3:
                return [_made(float32, value, f"{file_name}: {name}").data for value in values]
    raise ModelError(f"No file in {directory} declares {name}.", "Download preprocessor_config.json of the model.")


# The prompt of a reranker, `tokenizer.chat_template.rerank`: llama.cpp replaces `{query}` and `{document}` in it.

PromptChoice = Literal["official", "llamacpp"]
PROMPTS: Final[tuple[PromptChoice, ...]] = ("official", "llamacpp")

NAMES_KEY: Final = "tokenizer.chat_templates"
DEFAULT_KEY: Final = "tokenizer.chat_template"

_SIDES: Final = ("{query}", "{document}")


def rank_prompt(official: PromptSpec, choice: PromptChoice, instruction: str | None) -> str:
    """The template to write; `llamacpp` is the text family's, which llama.cpp's converter writes for every reranker."""
    prompt = UPSTREAM_RERANKER if choice == "llamacpp" else official
    chosen = instruction or prompt.default_instruction
    if any(side in chosen for side in _SIDES):
        raise UsageError("--instruction must not contain {query} or {document}, which llama.cpp would replace.")
    return prompt.template.replace("{instruction}", chosen)


def template_metadata(directory: Path, rank_template: str | None) -> Mapping[str, Value]:
    """The chat templates of the checkpoint, by name where there are several, and the rank template."""
    named = _named_templates(directory)
    if rank_template is not None:
        named["rerank"] = rank_template
    default = named.pop("default", None)
    fields = {f"{DEFAULT_KEY}.{name}": string(template) for name, template in named.items()}
    if named:
        fields[NAMES_KEY] = array(GGUFValueType.STRING, sorted(named))
    return fields | ({DEFAULT_KEY: string(default)} if default is not None else {})


def _named_templates(directory: Path) -> dict[str, str]:
    config = directory / "tokenizer_config.json"
    declared = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(declared, list):
        return {str(_object(each).get("name")): str(_object(each).get("template")) for each in declared}
    if isinstance(declared, str):
        return {"default": declared}
    templates: dict[str, str] = {}
    if (directory / "chat_template.jinja").is_file():
        templates["default"] = _template(directory / "chat_template.jinja")
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = _template(path)
    elif (directory / "chat_template.json").is_file():
        templates["default"] = str(read_json(directory / "chat_template.json").get("chat_template"))
    return templates


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from None
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {reason(error)}.") from None


# The tokenizer, from tokenizer.json and tokenizer_config.json. A pre-tokenizer other than the family's is refused:
# llama.cpp would silently split text in another way than in training.

_ID_KEYS: Final = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelt so in llama.cpp
    "pad": "padding_token_id",
}


def tokenizer_metadata(
    directory: Path, tokenizer: Mapping[str, Any], vocab_size: int, spec: TokenizerSpec
) -> Mapping[str, Value]:
    """The `tokenizer.*` fields, chat templates excepted; `vocab_size` is the number of rows of the embedding."""
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ModelError(f"{directory / 'tokenizer.json'} contains no BPE model.")
    _require_split(directory, tokenizer, spec)
    tokens, kinds = _tokens(directory, tokenizer, vocab_size)
    config = directory / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    fields = {
        "tokenizer.ggml.model": string(spec.gguf_model),
        "tokenizer.ggml.pre": string(spec.gguf_pre),
        "tokenizer.ggml.tokens": array(GGUFValueType.STRING, tokens),
        "tokenizer.ggml.token_type": array(GGUFValueType.INT32, kinds),
        "tokenizer.ggml.merges": array(GGUFValueType.STRING, _merges(model)),
    }
    return fields | dict(_special_tokens(directory, tokenizer, settings))


def token_id(tokenizer: Mapping[str, Any], text: str) -> int:
    """The id of a text that is one token of the vocabulary. Raises ModelError."""
    number = _vocabulary(tokenizer).get(text)
    if number is None:
        raise ModelError(f"tokenizer.json has no token {text!r}, which the rank head needs.")
    return number


def _require_split(directory: Path, tokenizer: Mapping[str, Any], spec: TokenizerSpec) -> None:
    split = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    patterns = [_object(step.get("pattern")).get("Regex") for step in split if step.get("type") == "Split"]
    if patterns != [spec.split_pattern] or split[-1].get("type") != "ByteLevel":
        raise ModelError(
            f"The pre-tokenizer of {directory / 'tokenizer.json'} is not {spec.gguf_pre}.",
            "llama.cpp would read other tokens than the model was trained with.",
        )


def _steps(declared: Any, several: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the only step; what is none has no type."""
    steps = _object(declared).get(several)
    return [_object(step) for step in (steps if isinstance(steps, list) and steps else [declared])]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# What tokenizer.json holds is a stranger's: every entry that a GGUF file takes over is looked at before.


def _vocabulary(tokenizer: Mapping[str, Any]) -> Mapping[str, int]:
    vocabulary = _object(tokenizer.get("model")).get("vocab")
    if not isinstance(vocabulary, dict):
        raise ModelError("The vocabulary in tokenizer.json must be an object of tokens and ids.")
    for text, number in vocabulary.items():
        if type(number) is not int or number < 0:
            raise ModelError(f"The token {text!r:.80} in tokenizer.json has the id {as_json(number)}.")
    return vocabulary


def _added(tokenizer: Mapping[str, Any]) -> list[tuple[int, str, bool]]:
    """Id, text and whether it is special, of each added token."""
    declared = tokenizer.get("added_tokens")
    if declared is not None and not isinstance(declared, list):
        raise ModelError("The value of `added_tokens` in tokenizer.json must be a list.")
    added = []
    for token in map(_object, declared or ()):
        number, text = token.get("id"), token.get("content")
        if type(number) is not int or number < 0 or not isinstance(text, str):
            raise ModelError(
                f"An added token in tokenizer.json has the id {as_json(number)} and the text {as_json(text)}."
            )
        added.append((number, text, bool(token.get("special"))))
    return added


def _merges(model: Mapping[str, Any]) -> list[str]:
    declared = model.get("merges")
    if not isinstance(declared, list):
        raise ModelError("The value of `merges` in tokenizer.json must be a list.")
    return [_merge(pair) for pair in declared]


def _merge(pair: Any) -> str:
    if isinstance(pair, str):
        return pair
    if not isinstance(pair, list) or not all(isinstance(part, str) for part in pair):
        raise ModelError(f"The merge rule {as_json(pair)} in tokenizer.json must be a pair of texts.")
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)  # GPT-2's letter for a space


def _tokens(directory: Path, tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The token of each id and its type; ids without a token are padding of the embedding."""
    added = {number: (text, special) for number, text, special in _added(tokenizer)}
    texts = {number: text for text, number in _vocabulary(tokenizer).items()}
    texts |= {number: text for number, (text, _) in added.items()}
    if max(texts, default=0) >= vocab_size:
        raise ModelError(
            f"{directory / 'tokenizer.json'} contains token id {max(texts):,}; the embedding has {vocab_size:,} rows."
        )
    tokens, kinds = [], []
    for number in range(vocab_size):
        tokens.append(texts.get(number, f"[PAD{number}]"))
        special = added[number][1] if number in added else None
        kinds.append(int(_kind(tokens[-1], number in texts, special)))
    return tokens, kinds


def _kind(text: str, is_used: bool, special: bool | None) -> TokenType:  # noqa: FBT001 - two of three facts
    """The type of a token; `special` is None where it is not an added one."""
    if not is_used:
        return TokenType.UNUSED
    if special is None:
        return TokenType.NORMAL
    looks_special = text.startswith("<|") and text.endswith("|>")  # some of these are published unmarked
    return TokenType.CONTROL if special or looks_special else TokenType.USER_DEFINED


def _special_tokens(
    directory: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[str, Value]]:
    ids = {text: number for number, text, _ in _added(tokenizer)}
    named = {kind: _content(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "sep", "pad")}
    flags = {kind: settings.get(f"add_{kind}_token") for kind in ("bos", "eos")}
    adds = {kind: flag for kind, flag in flags.items() if isinstance(flag, bool)}
    appended = _appended_token(tokenizer)
    if any(step.get("type") == "ByteLevel" for step in _steps(tokenizer.get("post_processor"), "processors")):
        adds = {"bos": False, "eos": False}
    if appended and appended != named["eos"]:  # an embedder ends with <|endoftext|>, chats with <|im_end|>
        named |= {"eot": named["eos"], "eos": appended}
    if appended:
        adds["eos"] = True
    numbers = {kind: ids[text] for kind, text in named.items() if text in ids}
    for kind, number in (_numbers_of_config(directory) | numbers).items():
        yield f"tokenizer.ggml.{_ID_KEYS[kind]}", uint32(number)
    for kind, flag in adds.items():
        yield f"tokenizer.ggml.add_{kind}_token", boolean(flag)


def _content(declared: Any) -> str | None:
    """The text of a special token, which may be declared as an object."""
    text = declared.get("content") if isinstance(declared, dict) else declared
    return text if isinstance(text, str) else None


def _appended_token(tokenizer: Mapping[str, Any]) -> str | None:
    """The token that the tokenizer itself appends to every text."""
    for step in _steps(tokenizer.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing":
            single = step.get("single")
            last = _object(single[-1]) if isinstance(single, list) and single else {}
            token = _object(last.get("SpecialToken")).get("id")
            return token if isinstance(token, str) and token else None
    return None


def _numbers_of_config(directory: Path) -> dict[str, int]:
    """Ids in config.json, for kinds that the tokenizer does not name."""
    config = read_json(directory / "config.json")
    text = config.get("text_config", {})
    found = {kind: config.get(f"{kind}_token_id", text.get(f"{kind}_token_id")) for kind in ("bos", "eos", "pad")}
    return {kind: number for kind, number in found.items() if isinstance(number, int)}
