"""The metadata of a GGUF file: model, prompt, tokenizer, vision projector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from gguf.constants import GGML_QUANT_VERSION, GGUFValueType, PoolingType, TokenType
from gguf.utility import size_label

from qtool.arch.detect import Detection
from qtool.arch.families import UPSTREAM_RERANKER
from qtool.arch.family import Family, TokenizerSpec
from qtool.arch.prompts import NO, YES, PromptSpec
from qtool.arch.spec import Config, Task, dimension, real_number
from qtool.errors import ModelError, UsageError
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
    named = {field: make(declared[key]) for key, (field, make) in _SAMPLING.items() if key in declared}
    return {f"general.sampling.{field}": value for field, value in named.items()}


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
        raise ModelError(f"config.json: The rotary embedding is {rope!r:.80}, expected an object.")
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _PLAIN_ROPE:
        raise ModelError(f"config.json: The type of rotary embedding is {kind!r}; expected 'default'.")
    if "mrope_section" in rope:
        declared = rope["mrope_section"]
        if not isinstance(declared, list) or not all(type(each) is int for each in declared):
            raise ModelError(f"config.json: mrope_section is {declared!r:.80}, expected a list of integers.")
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
    return {f"{architecture}.n_deepstack_layers": uint32(len(vision.get("deepstack_visual_indexes", ())))}


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
    deepstack = set(vision.get("deepstack_visual_indexes", ()))
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
        "attention.layer_norm_epsilon": float32(text.get("rms_norm_eps", 1e-6)),
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
            values = declared.get("image_processor", declared).get(name)
            if isinstance(values, list) and len(values) == 3:
                return [float32(value).data for value in values]
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
        return {str(each["name"]): str(each["template"]) for each in declared}
    if isinstance(declared, str):
        return {"default": declared}
    templates: dict[str, str] = {}
    if (directory / "chat_template.jinja").is_file():
        templates["default"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = path.read_text(encoding="utf-8")
    elif (directory / "chat_template.json").is_file():
        templates["default"] = str(read_json(directory / "chat_template.json").get("chat_template"))
    return templates


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
        "tokenizer.ggml.merges": array(GGUFValueType.STRING, map(_merge, model["merges"])),
    }
    return fields | dict(_special_tokens(directory, tokenizer, settings))


def token_id(tokenizer: Mapping[str, Any], text: str) -> int:
    """The id of a text that is one token of the vocabulary. Raises ModelError."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if text not in vocabulary:
        raise ModelError(f"tokenizer.json has no token {text!r}, which the rank head needs.")
    return int(vocabulary[text])


def _require_split(directory: Path, tokenizer: Mapping[str, Any], spec: TokenizerSpec) -> None:
    split = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    patterns = [step.get("pattern", {}).get("Regex") for step in split if step.get("type") == "Split"]
    if patterns != [spec.split_pattern] or split[-1].get("type") != "ByteLevel":
        raise ModelError(
            f"The pre-tokenizer of {directory / 'tokenizer.json'} is not {spec.gguf_pre}.",
            "llama.cpp would read other tokens than the model was trained with.",
        )


def _steps(declared: Any, several: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the only step."""
    if not isinstance(declared, dict):
        return [{}]
    return list(declared.get(several) or [declared])


def _tokens(directory: Path, tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The token of each id and its type; ids without a token are padding of the embedding."""
    added = {token["id"]: token for token in tokenizer.get("added_tokens", ())}
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts) >= vocab_size:
        raise ModelError(
            f"{directory / 'tokenizer.json'} contains token id {max(texts):,}; the embedding has {vocab_size:,} rows."
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
    looks_special = text.startswith("<|") and text.endswith("|>")  # some of these are published unmarked
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
    return declared.get("content") if isinstance(declared, dict) else declared


def _appended_token(tokenizer: Mapping[str, Any]) -> str | None:
    """The token that the tokenizer itself appends to every text."""
    for step in _steps(tokenizer.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing":
            last = (step.get("single") or [{}])[-1]
            token = last.get("SpecialToken", {}).get("id")
            return str(token) if token else None
    return None


def _numbers_of_config(directory: Path) -> dict[str, int]:
    """Ids in config.json, for kinds that the tokenizer does not name."""
    config = read_json(directory / "config.json")
    text = config.get("text_config", {})
    found = {kind: config.get(f"{kind}_token_id", text.get(f"{kind}_token_id")) for kind in ("bos", "eos", "pad")}
    return {kind: number for kind, number in found.items() if isinstance(number, int)}
