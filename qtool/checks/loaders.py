"""What each engine takes from a checkpoint's folder, in order: the precedence of files and fields, as data with sources.

An artefact is right when every engine here would read the reference's model from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from qtool.errors import ModelError, reason
from qtool.jsonfile import read_json
from qtool.storage.checkpoint import INDEX, SINGLE, weight_map

TRANSFORMERS, VLLM, SGLANG = "transformers 5.14.1", "vLLM 0.32.0", "SGLang 0.5.23"
QTOOL: Final = "qtool"
SENTENCE_TRANSFORMERS, LLAMA_CPP = "sentence-transformers 6.2.0", "llama.cpp's converter (b11549)"
"""The versions whose loaders were read; sentence-transformers loads weights, config and tokenizer by transformers."""


# Weights. Engines differ most here: some take the first file of a list, some all files of a pattern.


@dataclass(frozen=True)
class WeightRule:
    """The weight files that an engine loads: those of the first of `order` that has any.

    A pattern stands for all files that match it but hidden ones, as Python's glob does, an index for all that it names,
    `FILE#FIELD` for the file named in a field. Where `filtered`, files that an index beside them does not name are left
    out.
    """

    engine: str
    order: Sequence[str]
    source: str
    filtered: bool = False


WEIGHT_RULES: Final = (
    WeightRule(
        TRANSFORMERS,
        ("config.json#transformers_weights", SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"),
        "transformers/modeling_utils.py, _get_resolved_checkpoint_files",
    ),
    WeightRule(
        VLLM,
        ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt"),
        "vllm/model_executor/model_loader/default_loader.py, _prepare_weights; weight_utils.py, "
        "filter_duplicate_safetensors_files",
        filtered=True,
    ),
    WeightRule(
        SGLANG,
        ("*.safetensors", "*.bin", "*.pt"),
        "sglang/srt/model_loader/loader.py, _prepare_weights",
        filtered=True,
    ),
    WeightRule(
        LLAMA_CPP,
        (INDEX, "model*.safetensors", "pytorch_model*.bin"),
        "conversion/base.py, ModelBase.index_tensors",
    ),
)
UNREAD_WEIGHTS: Final = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt")
"""Weights of other formats, which no engine takes where there are safetensors."""


def weight_files(rule: WeightRule, folder: FolderFiles) -> frozenset[str]:
    """The weight files that the engine of `rule` loads from the folder's top level."""
    for place in rule.order:
        if found := _files_at(place, folder):
            is_filtered = rule.filtered and INDEX in folder.names and not place.startswith("consolidated")
            return found & folder.indexed if is_filtered and found & folder.indexed else found
    return frozenset()


def _files_at(place: str, folder: FolderFiles) -> frozenset[str]:
    file, _, field = place.partition("#")
    if field:
        named = folder.json(file).get(field)
        return frozenset({named} if isinstance(named, str) else ())
    if place == INDEX:
        return folder.indexed if INDEX in folder.names else frozenset()
    return frozenset(name for name in folder.top if fnmatchcase(name, place) and not name.startswith("."))


# Everything of which there is one at a time. A place is a file, or `FILE#FIELD.FIELD` for a field of a JSON file.


@dataclass(frozen=True)
class Reading:
    """What some engines read a thing from: the first of `places` that is there; `vision` only of models with pictures."""

    engines: Sequence[str]
    places: Sequence[str]
    source: str
    vision: bool = False


@dataclass(frozen=True)
class Thing:
    """Something that engines take from a folder, and what depends on it.

    `substitutes` are places whose content is another thing's, taken where there is nothing better.
    """

    name: str
    effect: str
    readings: Sequence[Reading]
    substitutes: Collection[str] = ()

    def read(self, *, is_vision: bool) -> tuple[Reading, ...]:
        """How engines read it of a model with pictures, or of one without."""
        return tuple(reading for reading in self.readings if is_vision or not reading.vision)


CHAT_TEMPLATE: Final = Thing(
    "chat template",
    "vLLM and sentence-transformers then read another prompt",
    (
        Reading(
            (TRANSFORMERS, SENTENCE_TRANSFORMERS, VLLM, SGLANG),
            ("chat_template.jinja", "tokenizer_config.json#chat_template"),
            "transformers/tokenization_utils_base.py, _from_pretrained; sglang/srt/entrypoints/openai/serving_rerank.py",
        ),
        Reading(  # the processor's own, which SGLang's rerankers do not look at
            (TRANSFORMERS, SENTENCE_TRANSFORMERS, VLLM),
            (
                "processor_config.json#chat_template",
                "chat_template.json#chat_template",
                "chat_template.jinja",
                "tokenizer_config.json#chat_template",
            ),
            "transformers/processing_utils.py, get_processor_dict; vllm/renderers/hf.py, resolve_chat_template",
            vision=True,
        ),
        Reading(
            (LLAMA_CPP,),
            ("tokenizer_config.json#chat_template", "chat_template.jinja", "chat_template.json#chat_template"),
            "gguf-py/gguf/vocab.py, SpecialVocab._try_load_from_tokenizer_json",
        ),
    ),
)
IMAGE_PROCESSOR_FILE: Final = Thing(
    "image processor",
    "engines prepare pictures with it",
    (
        Reading(
            (TRANSFORMERS, SENTENCE_TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP),
            ("processor_config.json#image_processor", "preprocessor_config.json"),
            "transformers/image_processing_base.py, get_image_processor_dict; conversion/base.py, MmprojModel.__init__",
            vision=True,
        ),
    ),
)
VIDEO_PROCESSOR_FILE: Final = Thing(
    "video processor",
    "engines prepare videos with it",
    (
        Reading(
            (TRANSFORMERS, SENTENCE_TRANSFORMERS, VLLM, SGLANG),
            ("processor_config.json#video_processor", "video_preprocessor_config.json", "preprocessor_config.json"),
            "transformers/video_processing_utils.py, get_video_processor_dict",
            vision=True,
        ),
    ),
    substitutes=("preprocessor_config.json",),
)
PROCESSOR: Final = Thing(
    "class of the processor",
    "it puts pictures into the prompt",
    (
        Reading(
            (TRANSFORMERS, SENTENCE_TRANSFORMERS, SGLANG),
            (
                "processor_config.json#processor_class",
                "preprocessor_config.json#processor_class",
                "tokenizer_config.json#processor_class",
                "config.json#processor_class",
            ),
            "transformers/models/auto/processing_auto.py, AutoProcessor.from_pretrained",
            vision=True,
        ),
    ),
)
QUANTIZATION: Final = Thing(
    "quantization",
    "engines read the weights by it",
    (
        Reading(
            (TRANSFORMERS, SENTENCE_TRANSFORMERS),
            ("config.json#quantization_config",),
            "transformers/quantizers/auto.py",
        ),
        Reading(
            (VLLM,),
            (
                "config.json#quantization_config",
                "hf_quant_config.json",
                "config.json#text_config.quantization_config",
                "config.json#compression_config",
            ),
            "vllm/transformers_utils/config.py, get_config; model_loader/weight_utils.py, get_quant_config",
        ),
        Reading(
            (SGLANG,),
            ("config.json#quantization_config", "config.json#compression_config", "hf_quant_config.json"),
            "sglang/srt/configs/model_config.py, _parse_quant_hf_config",
        ),
    ),
)
TYING: Final = Thing(
    "tying of the head",
    "the head is the embedding, or a matrix of its own",
    (
        Reading(
            (TRANSFORMERS, SENTENCE_TRANSFORMERS, VLLM, SGLANG),
            ("config.json#tie_word_embeddings",),
            "transformers/modeling_utils.py, get_expanded_tied_weights_keys; vllm/config/vllm.py, with_hf_config (earlier "
            "versions went by the inner field); the family's file in sglang/srt/models",
            vision=True,
        ),
        Reading(
            (LLAMA_CPP,),
            ("config.json#text_config.tie_word_embeddings", "config.json#tie_word_embeddings"),
            "conversion/base.py, TextModel.__init__",
            vision=True,
        ),
    ),
)
SEQUENCE_CONFIG: Final = Thing(
    "lengths and processor arguments",
    "sentence-transformers takes lengths and processor arguments from it",
    (
        Reading(
            (SENTENCE_TRANSFORMERS, VLLM),
            (
                "sentence_bert_config.json",
                "sentence_roberta_config.json",
                "sentence_distilbert_config.json",
                "sentence_camembert_config.json",
                "sentence_albert_config.json",
                "sentence_xlm-roberta_config.json",
                "sentence_xlnet_config.json",
            ),
            "sentence_transformers/base/modules/transformer.py, load_config; vllm/transformers_utils/config.py",
        ),
    ),
)
THINGS: Final = (CHAT_TEMPLATE, IMAGE_PROCESSOR_FILE, VIDEO_PROCESSOR_FILE, SEQUENCE_CONFIG)
"""What is compared between an artefact and its reference as each engine takes it."""

ROPE_PLACES: Final = ("rope_scaling", "rope_parameters")
"""The rotary embedding of a (text) config: transformers' convert_rope_params_to_dict prefers the old name, qtool the new."""
DTYPE_PLACES: Final = ("dtype", "torch_dtype", "text_config.dtype", "text_config.torch_dtype")
"""The declared element type: vllm/config/model.py, _find_dtype; transformers/modeling_utils.py, _get_dtype."""
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "tekken.json",
)  # fmt: skip
"""What transformers' AutoTokenizer builds a tokenizer from (tokenization_utils_base.py, from_pretrained)."""

ADAPTER: Final = "adapter_config.json"
"""Makes transformers and sentence-transformers add an adapter's weights: transformers/integrations/peft.py, and
sentence_transformers/base/modules/transformer.py, _load_config; vLLM and SGLang load adapters only when told to."""
CODE_FIELD: Final = "auto_map"
CODE_FILES: Final = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
"""The files in which `auto_map` names code of the folder's own (transformers/dynamic_module_utils.py)."""


@dataclass(frozen=True)
class FolderFiles:
    """The files of a checkpoint's folder, read once and only when asked for.

    `names` may list more than lies in `directory`: of a repository on the hub only small files are fetched.
    """

    directory: Path
    names: Collection[str]

    @cached_property
    def _read(self) -> dict[str, Mapping[str, Any]]:
        return {}

    @cached_property
    def top(self) -> frozenset[str]:
        """The files that lie in no folder of their own."""
        return frozenset(name for name in self.names if "/" not in name)

    def json(self, name: str) -> Mapping[str, Any]:
        """The object in a JSON file, empty where there is none. Raises ModelError."""
        if name not in self._read:
            path = self.directory / name
            self._read[name] = read_json(path) if name in self.names and path.is_file() else {}
        return self._read[name]

    @cached_property
    def indexed(self) -> frozenset[str]:
        """The weight files that the index names."""
        return frozenset(weight_map(self.directory).values() if (self.directory / INDEX).is_file() else ())

    def value_at(self, place: str) -> Any:
        """What stands at a place; None where nothing does. Raises ModelError."""
        file, _, field = place.partition("#")
        if file not in self.names or not (self.directory / file).is_file():
            return None
        if not file.endswith(".json"):
            return self.text(file)
        value: Any = self.json(file)
        for part in field.split(".") if field else ():
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def text(self, name: str) -> str:
        """The text of a file, as Python reads it for engines: UTF-8, line ends as newlines. Raises ModelError."""
        path = self.directory / name
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from None
        except OSError as error:
            raise ModelError(f"Cannot read {path}: {reason(error)}.") from None


def taken(reading: Reading, folder: FolderFiles) -> tuple[str, Any] | None:
    """Place and value of what the engines of `reading` take, or None."""
    for place in reading.places:
        value = folder.value_at(place)
        if value is not None:
            return place, value
    return None


def engine_names(engines: Sequence[str]) -> str:
    """Engines without their versions, as the subject of a sentence."""
    names = [engine.partition(" ")[0] if engine != LLAMA_CPP else "llama.cpp's converter" for engine in engines]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
