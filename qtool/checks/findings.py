"""The catalogue of findings: every code, with its severity, its sentence and its remedy, as data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from qtool.checks.fitted_codes import FITTED_CODES
from qtool.checks.score_codes import SCORE_CODES
from qtool.escaping import printable as printable  # noqa: PLC0414 - also for those who show findings
from qtool.storage.gguf_model import is_gguf

_LONGEST_COMMAND: Final = 5000


class Severity(str, Enum):
    """`broken` gives wrong answers or none, `warning` may, `note` is worth knowing."""

    BROKEN = "broken"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that was found: a code to look up and a sentence; `remedy` is a command, empty if nothing needs repair."""

    code: str
    severity: Severity
    sentence: str
    remedy: str = ""


@dataclass(frozen=True)
class Code:
    """What one code means."""

    severity: Severity
    sentence: str
    remedy: str = ""


def broken(sentence: str, remedy: str = "") -> Code:
    """What gives wrong answers or none."""
    return Code(Severity.BROKEN, sentence, remedy)


def warning(sentence: str, remedy: str = "") -> Code:
    """What may give wrong answers."""
    return Code(Severity.WARNING, sentence, remedy)


def note(sentence: str, remedy: str = "") -> Code:
    """What is worth knowing."""
    return Code(Severity.NOTE, sentence, remedy)


def finding(code: str, target: object, **facts: Any) -> Finding:
    """What `code` says of the artefact at `target`, a path or an address; `facts` fill the braces of its sentence."""
    place = str(target)
    known = {
        "target": shlex.quote(place),
        "file": "FILE" if place.startswith("hf://") else shlex.quote(place),
        "maker": "convert-gguf" if is_gguf(place) else "quantize",
        "name": "'*'",
        **{name: printable(fact) if isinstance(fact, str) else fact for name, fact in facts.items()},
    }
    meaning = CODES[code]
    remedy = printable(meaning.remedy.format(**known), _LONGEST_COMMAND)
    return Finding(code, meaning.severity, meaning.sentence.format(**known), remedy)


def listed(names: Sequence[str]) -> str:
    """The first of `names` and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def listed_are(names: Sequence[str]) -> str:
    """Likewise, as the subject of a sentence with its verb."""
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"


# Every code that an inspection can give. A code keeps its meaning; the sentence says what goes wrong, not only what a
# field contains. Braces are facts of the case; `{target}` is what was inspected, `{file}` its place on this machine.

_REPAIR: Final = "qtool repair-gguf {file} -o FIXED.gguf --task {task}"
_REPAIR_FROM: Final = _REPAIR + " --base MODEL"
_CONVERT: Final = "qtool convert-gguf MODEL -o OUT"
_QUANTIZE: Final = "qtool quantize MODEL -o OUT"
_MAKE: Final = "qtool {maker} MODEL -o OUT"
_TASK: Final = "qtool inspect {target} --task {task}"
_FETCH: Final = "hf download ORG/NAME {name} --local-dir {file}"

_GGUF_FILE: Final[Mapping[str, Code]] = {
    "gguf-foreign": note("This is {what}, which qtool does not check."),
    "gguf-no-architecture": broken(
        "The file has no general.architecture, so llama.cpp refuses to load it.", _CONVERT
    ),
    "gguf-missing-part": broken(
        "The file is split into {count} parts, and {missing} is missing.",
        "hf download ORG/NAME {missing} --local-dir FOLDER",
    ),
    "gguf-part-count": broken("The parts hold {found} tensors; their header declares {declared}.", _CONVERT),
    "gguf-missing-field": broken("The file lacks {field}, so llama.cpp refuses to load it.", _CONVERT),
    "gguf-missing-tensor": broken("The file lacks {tensors}, so llama.cpp refuses to load it.", _CONVERT),
    "gguf-tensor-shape": broken(
        "{tensor} has the shape {found}, expected {expected} by the file's fields: llama.cpp refuses to load it.", _CONVERT
    ),
    "gguf-unknown-tensor": broken(
        "The file holds {tensors}, which the architecture does not have, so llama.cpp refuses to load it.", _CONVERT
    ),
    "gguf-refused": broken("llama.cpp refuses to load the file: {problem}.", _CONVERT),
    "gguf-aborts": broken("llama.cpp ends the whole process with this file: {problem}.", _CONVERT),
    "gguf-stray-scale": broken(
        "The file holds {tensors} beside a weight that is stored as {type}: llama.cpp multiplies by it.", _CONVERT
    ),
    "gguf-file-type": warning(
        "general.file_type declares {declared}, and no matrix is stored so; most are {found}.", _CONVERT
    ),
}  # fmt: skip
_GGUF_TASK: Final[Mapping[str, Code]] = {
    "gguf-task-undeclared": warning(
        "The file does not declare whether it is a reranker or an embedder; a reranker that was converted as a plain chat "
        "model does not either{hint}.",
        _TASK,
    ),
    "gguf-no-pooling": broken(
        "The pooling type is missing, so llama.cpp pools with {expected} only when the caller asks for it.", _REPAIR
    ),
    "gguf-wrong-pooling": broken("The pooling type is {found}; {doer} needs {expected}.", _REPAIR),
    "gguf-no-rank-head": broken(
        "The rank head cls.output.weight is missing: llama.cpp returns scores of about 1e-20 without an error.", _REPAIR
    ),
    "gguf-head-shape": broken(
        "The rank head has the shape {found}, expected {expected}: one row for yes, one for no.", _CONVERT
    ),
    "gguf-head-quantized": broken(
        "The rank head is stored as {type} with {bits:.3g} bits per weight; every score depends on its two rows.",
        _REPAIR_FROM,
    ),
    "gguf-head-8-bit": warning(
        "The rank head is stored as {type}: its rounding error is in every score, and 16 bits would cost a few kilobytes.",
        _REPAIR_FROM,
    ),
    "gguf-head-exchanged": broken(
        "The rows of the rank head are [no, yes], and llama.cpp ranks by the first: the best document comes last.",
        _REPAIR,
    ),
    "gguf-labels": broken(
        "The labels of the rank head are {found}, expected [yes, no]: the score is not the probability of yes.", _REPAIR
    ),
    "gguf-no-rerank-template": broken(
        "The rerank template is missing: llama.cpp joins query and document in a way that the model was not trained on.",
        _REPAIR,
    ),
    "gguf-wrong-rerank-template": broken(
        "The rerank template is {whose}: scores drift from the official ones.", _REPAIR
    ),
    "gguf-incomplete-rerank-template": broken("The rerank template lacks {{{side}}}.", _REPAIR),
    "gguf-doubled-placeholder": broken(
        "The rerank template has {{{side}}} {count} times, and llama.cpp fills in each.", _REPAIR
    ),
    "gguf-exchanged-placeholders": broken(
        "The rerank template puts the document where the query belongs, and the query in its place.", _REPAIR
    ),
    "gguf-padded-rerank-template": broken(
        "The rerank template is the official one with {found} before or after it, which llama.cpp sends, too.", _REPAIR
    ),
    "gguf-respaced-rerank-template": broken(
        "The rerank template is the official one with other white space: the model reads other tokens.", _REPAIR
    ),
    "gguf-ranker-markers": broken(
        "An embedder holds {found}, which only rerankers have: programs that go by it take the file for one.", _CONVERT
    ),
    "gguf-unknown-rerank-template": warning(
        "The rerank template is not the official one: scores drift from the official ones.", _REPAIR
    ),
    "gguf-own-instruction": note("The rerank template has an instruction of its own: {instruction}"),
}  # fmt: skip
_GGUF_TOKENIZER: Final[Mapping[str, Code]] = {
    "gguf-tokenizer": broken("The tokenizer's {field} is {found}, expected {expected}.", _CONVERT),
    "gguf-pre-tokenizer": broken(
        "The pre-tokenizer is {found}, expected {expected}: text is split differently than in training.", _CONVERT
    ),
    "gguf-no-yes-no-token": broken(
        "The vocabulary has no token {word}, so its rank head cannot be the official one.", _CONVERT
    ),
    "gguf-prompt-token": broken(
        "{token} of the official prompt is not a special token of this file, so it is split into several tokens.", _CONVERT
    ),
    "gguf-template-names": warning(
        "tokenizer.chat_templates names {found}; the templates in the file are {expected}.", _CONVERT
    ),
    "gguf-start-token": broken("llama.cpp adds a start token before every text; the family has none.", _CONVERT),
    "gguf-end-token": broken("{problem}, so the embedding is taken from the wrong token.", _CONVERT),
}  # fmt: skip
_GGUF_POSITIONS: Final[Mapping[str, Code]] = {
    "gguf-rope": broken("The rotary embedding is wrong: {problem}.", _CONVERT),
    "gguf-rope-scaling": warning("Positions are scaled ({found}); no published model of the family does so.", _CONVERT),
    "gguf-not-causal": broken("Attention is declared not to be causal; the family's is.", _CONVERT),
    "gguf-deepstack": broken("The deepstack features of pictures are lost: {problem}.", _CONVERT),
}  # fmt: skip
_PROJECTOR: Final[Mapping[str, Code]] = {
    "mmproj-missing": warning("There is no vision projector beside the file: it reads texts, but no pictures.", _CONVERT),
    "mmproj-unreadable": broken("The projector {projector} cannot be read: {problem}", _CONVERT),
    "mmproj-type": broken("The projector {projector} is of type {found}, expected {expected}.", _CONVERT),
    "mmproj-width": broken("{projector} gives vectors of {found}; the language model takes {expected}.", _CONVERT),
    "mmproj-deepstack": broken(
        "{projector} has {found} deepstack layers; the language model takes {expected}.", _CONVERT
    ),
    "mmproj-deepstack-flags": broken(
        "The projector flags the layers {flagged} for deepstack, but has mergers for {found}.", _CONVERT
    ),
    "mmproj-missing-field": broken("The projector lacks {field}, so llama.cpp refuses to load it.", _CONVERT),
    "mmproj-missing-tensor": broken("The projector lacks {tensors}, so llama.cpp refuses to load it.", _CONVERT),
    "mmproj-taken-tensor": broken(
        "The projector holds {tensors}, which the family does not have and llama.cpp computes with.", _CONVERT
    ),
    "mmproj-tensor-shape": broken(
        "The projector's {tensor} has the shape {found}, expected {expected} by the file's fields.", _CONVERT
    ),
}  # fmt: skip
_NVFP4: Final[Mapping[str, Code]] = {
    "nvfp4-missing-scale": broken("{tensors} missing: engines read the weights at a wrong scale without an error.", _MAKE),
    "nvfp4-no-scales": warning(
        "No NVFP4 tensor has a global scale: right if llama.cpp quantized the file, wrong if it came from ModelOpt.",
        _CONVERT,
    ),
    "nvfp4-scales-ignored": warning(
        "llama.cpp (seen up to {build}) ignores the feed-forward scales of {architecture}: scores of this file are wrong "
        "there, or not finite.",
        _CONVERT + " --outtype q8_0",
    ),
    "nvfp4-scale-type": broken("{tensor} is stored as {found}, expected {expected}.", _QUANTIZE),
    "nvfp4-scale-shape": broken("{tensor} has the shape {found}; its weight needs {expected}.", _QUANTIZE),
    "nvfp4-bad-scale": broken("{tensor} is {value}, expected a positive finite number.", _MAKE),
    "nvfp4-unequal-scales": broken(
        "The global scales of {group} differ; vLLM uses the largest for all of them without rescaling.", _QUANTIZE
    ),
    "nvfp4-unequal-source": note(
        "The global scales of {group} differ: llama.cpp applies each, but vLLM scores the source checkpoint wrong.",
        _QUANTIZE,
    ),
    "nvfp4-scales-unread": note(
        "The global scales were not checked: they are too far apart to be fetched alone; download the model first."
    ),
    "nvfp4-partial-group": broken("Only part of {group} is quantized; engines merge it into one product.", _QUANTIZE),
    "nvfp4-quantized-head": broken("{module} is quantized; no engine reads it quantized.", _QUANTIZE),
    "nvfp4-activations": note("Activations are quantized, too ({algorithm}); qtool verifies weights only."),
    "nvfp4-no-quantization-config": broken(
        "config.json has no quantization_config of its own, so engines read the packed weights as unquantized ones.", _QUANTIZE
    ),
    "nvfp4-no-hf-quant-config": warning(
        "hf_quant_config.json is missing; TensorRT-LLM and older engines read it.", _QUANTIZE
    ),
    "nvfp4-config-mismatch": broken("config.json and hf_quant_config.json differ in {field}.", _QUANTIZE),
    "nvfp4-declaration": broken(
        "config.json declares the quantization {found}, but the weights are stored {stored}: engines misread or refuse "
        "them.",
        _QUANTIZE,
    ),
    "nvfp4-scheme": broken(
        "The quantization_config of config.json says {field} = {found}, expected {expected} of W4A16 NVFP4.", _QUANTIZE
    ),
    "nvfp4-kv-cache": broken(
        "A quantized key-value cache is declared ({found}), but its scales are missing: engines quantize it with scale 1.",
        _QUANTIZE,
    ),
    "nvfp4-group-size": broken("The declared block size is {found}, expected 16.", _QUANTIZE),
    "excluded-modules-pattern": broken(
        "The excluded modules lack {expected}, the one pattern for the vision tower that both vLLM and SGLang match.",
        _QUANTIZE,
    ),
    "excluded-modules-missing": broken(
        "{modules} neither quantized nor excluded, so engines expect packed weights there.", _QUANTIZE
    ),
    "excluded-modules-renamed": warning(
        "{modules} excluded by names that SGLang 0.5.23 changes before it looks for them, so it expects packed weights "
        "there and stops loading; vLLM reads them.", _QUANTIZE
    ),
    "excluded-modules-packed": broken(
        "{modules} both packed and excluded, so engines read the packed bytes as weights.", _QUANTIZE
    ),
}  # fmt: skip
_CHECKPOINT: Final[Mapping[str, Code]] = {
    "safetensors-foreign": note("This is {what}, which qtool does not check."),
    "safetensors-task-undeclared": warning(
        "The checkpoint does not declare whether it is a reranker or an embedder.",
        "qtool inspect {target} --task rerank",
    ),
    "safetensors-missing-tensor": broken("{tensors} missing.", _FETCH),
    "safetensors-unknown-tensor": broken("The checkpoint holds {tensors}, which the architecture does not have."),
    "safetensors-tensor-twice": broken("{first} and {second} are the same tensor: engines take one of them, and not all the same."),
    "safetensors-tensor-shape": broken("{tensor} has the shape {found}, expected {expected} by config.json."),
    "safetensors-tensor-type": broken("{tensor} is stored as {found}, expected BF16, F16 or F32."),
    "safetensors-field-type": broken("config.json: {field} is {found}, expected {expected}.", _FETCH),
    "safetensors-two-weights": broken(
        "The folder holds two sets of weights: {engines} load {found}; {others} load {expected}."
    ),
    "safetensors-unread-weights": note("{names} not read by any engine, since there are safetensors files."),
    "safetensors-untied-head": broken(
        "The head is tied, but lm_head.weight is stored and differs from the embedding: transformers and vLLM take it, "
        "SGLang and llama.cpp do not."
    ),
    "safetensors-two-sources": warning(
        "The {thing} is in both {first} and {second}, which differ: which one counts depends on the engine and its version."
    ),
    "safetensors-declared-type": warning(
        "config.json declares {found}, but the weights are stored as {stored}: engines convert them while loading."
    ),
    "safetensors-unknown-type": broken("config.json declares the type {found}, which no engine computes in.", _FETCH),
    "safetensors-adapter": broken(
        "The folder holds {name}: transformers and sentence-transformers add its adapter, vLLM and SGLang load the weights "
        "without it."
    ),
    "safetensors-own-code": broken(
        "{path} names code of its own (auto_map), which engines run instead of theirs where remote code is trusted."
    ),
    "safetensors-code-file": note("The folder holds code that nothing refers to: {names}."),
    "safetensors-template-reference": broken("{path} includes another template, which engines cannot load."),
    "safetensors-rope": broken("The rotary embedding is wrong: {problem}.", _FETCH),
    "safetensors-deepstack": broken("The deepstack features of pictures are lost: {problem}.", _FETCH),
    "safetensors-pooling": broken("sentence-transformers pools with {found}, expected lasttoken.", _FETCH),
    "safetensors-pre-tokenizer": broken(
        "tokenizer.json does not split text as the pre-tokenizer {expected}: the model reads other tokens than in training.",
        _FETCH,
    ),
    "safetensors-no-yes-no-token": broken(
        "The vocabulary has no token {word}, so the model cannot answer with it.", _FETCH
    ),
    "safetensors-answer-ids": broken(
        "{path} takes the ids {found} for yes and no; the tokenizer has {expected}.", _FETCH
    ),
    "safetensors-missing-tokenizer": broken("The tokenizer is missing, so nothing can be scored.", _FETCH),
    "safetensors-missing-tokenizer-config": warning(
        "tokenizer_config.json is missing: padding side and special tokens are guessed.", _FETCH
    ),
    "safetensors-missing-chat-template": warning(
        "The chat template is missing: vLLM and sentence-transformers score the bare texts.", _FETCH
    ),
    "safetensors-missing-preprocessor": warning(
        "preprocessor_config.json is missing: engines cannot prepare pictures.", _FETCH
    ),
    "safetensors-missing-modules-json": warning(
        "modules.json is missing: sentence-transformers builds a new, random head.", _FETCH
    ),
    "safetensors-missing-module": warning(
        "modules.json names {path}, which is missing: sentence-transformers cannot load the model.", _FETCH
    ),
    "safetensors-missing-sentence-transformers-config": warning(
        "{name} is missing: sentence-transformers does not know {purpose}.", _FETCH
    ),
}  # fmt: skip

INSPECTION_CODES: Final[Mapping[str, Code]] = {
    **_GGUF_FILE, **_GGUF_TASK, **_GGUF_TOKENIZER, **_GGUF_POSITIONS, **_PROJECTOR, **_NVFP4, **_CHECKPOINT,
}  # fmt: skip
"""Every code of an inspection, in the order of the documentation."""


# Every code that the stages of a verification can give beside those: `other-` codes are differences from the reference,
# `weights-` codes compare values, `prompt-` codes what the model reads.

_HAS: Final = "{field} is {found}; the reference has {expected}"

_CONFIG: Final[Mapping[str, Code]] = {
    "unreadable": broken("The artefact cannot be read: {problem}"),
    "other-architecture": broken("The architecture is {found}; the reference has {expected}."),
    "other-task": broken("The artefact declares the task {found}; the reference declares {expected}.", _MAKE),
    "other-size": broken(f"The sizes differ: {_HAS}.", _MAKE),
    "other-rope": broken(f"The rotary embedding differs: {_HAS}.", _MAKE),
    "other-epsilon": broken(f"The epsilon of the norms differs: {_HAS}.", _MAKE),
    "other-deepstack": broken(f"The deepstack layers differ: {_HAS}.", _MAKE),
    "other-token-ids": broken(f"The ids of the picture tokens differ: {_HAS}.", _MAKE),
    "other-tying": broken(f"The head is another matrix: {_HAS}.", _MAKE),
    "other-config": broken(f"The computation differs: {_HAS}.", _MAKE),
    "unread-field": note("{fields} not read by llama.cpp for this architecture, so it has no effect."),
    "other-length": warning(f"The longest input differs: {_HAS}.", _MAKE),
    "unknown-field": warning(
        "config.json has {field} = {found}, the reference {expected}: qtool does not know whether an engine reads it."
    ),
    "unread-quantization": warning("The weights are quantized by {what}, which qtool does not read: nothing was compared."),
    "nothing-quantized": broken(
        "config.json declares {algorithm}, but no weight is packed: engines read plain weights as packed ones.", _QUANTIZE
    ),
    "mostly-unquantized": warning(
        "Only {found} of {expected} quantizable weights are packed: the artefact is larger than necessary."
    ),
}  # fmt: skip
_FILES: Final[Mapping[str, Code]] = {
    "other-tokenizer": broken("The tokenizer is another model's: {problem}.", _MAKE),
    "added-token-missing": broken(
        "The tokenizer lacks the added token {tokens}, whose text is then split into several tokens.", _MAKE
    ),
    "other-token-types": broken(
        "{tokens} of another type than in the reference: llama.cpp splits texts into other tokens.", _CONVERT
    ),
    "other-tokenizer-rules": broken("Text is split into other tokens: {part} differs from the reference's.", _MAKE),
    "other-attention-mask": broken(
        "{name} leaves attention_mask out of what the tokenizer gives: the model then reads the padding of a batch.", _FETCH
    ),
    "tokenizer-own-length": warning(
        "tokenizer.json {does} by itself ({setting}), the reference's does not: programs that take it as it is do so, "
        "transformers and qtool do not.",
    ),
    "other-tokenizer-class": broken(
        "The tokenizer class is {found}; the reference has {expected}: transformers, vLLM and SGLang split text otherwise.",
        _FETCH,
    ),
    "other-token-list": broken(
        "added_tokens_decoder gives {token} other properties than tokenizer.json: transformers follows the first.", _FETCH
    ),
    "other-truncation": broken(
        "The tokenizer cuts texts at {found} tokens, the reference's at {expected}: long documents lose their end.", _FETCH
    ),
    "tokenizer-refused": broken("transformers cannot build the tokenizer: {problem}", _FETCH),
    "other-ids": broken(
        "transformers gives {text} the ids {found}, with the reference's tokenizer {expected}.", _FETCH
    ),
    "other-padding-side": broken(
        "Batches are padded on the {found}, the reference's on the {expected}: the official code and "
        "sentence-transformers then read another position.",
        _FETCH,
    ),
    "other-special-tokens": warning(f"The special tokens differ: {_HAS}.", _MAKE),
    "missing-side-file": broken("{name} is missing; the reference has it: {effect}.", _FETCH),
    "other-side-file": broken("{name} differs from the reference's: {effect}.", _FETCH),
    "added-side-file": broken("{name} is not in the reference: {effect}."),
    "missing-rerank-template": broken(
        "rerank_template.jinja is missing: without it as --chat-template vLLM and SGLang send another prompt.",
        _QUANTIZE,
    ),
    "other-minor-file": warning("{name} differs from the reference's."),
    "other-instruction": broken(
        "The baked instruction is not the official one, and no manifest declares it: {instruction}", _CONVERT
    ),
    "other-baked-prompt": broken(
        "The baked prompt is not the official one, and no manifest declares it: from character {place} on it is {found}, "
        "expected {expected}.",
        _CONVERT,
    ),
    "other-rerank-template": broken("rerank_template.jinja does not render the official prompt for vLLM.", _QUANTIZE),
    "other-chat-template": warning("{field} differs from the reference's.", _CONVERT),
}  # fmt: skip
_CALIBRATION: Final[Mapping[str, Code]] = {
    "calibration-warning": warning("The data that the artefact was calibrated on: {warning}"),
    "calibration-panel": warning(
        "The artefact was calibrated on {data}, which holds {count} of the {total} documents of panel {panel}: the scores "
        "of this panel say little about other documents."
    ),
}  # fmt: skip
_TENSORS: Final[Mapping[str, Code]] = {
    "missing-tensor": broken("{tensors} missing from the artefact.", _MAKE),
    "missing-head": broken(
        "The head lm_head.weight is missing, and none is tied: engines use random weights, or refuse the model.", _MAKE
    ),
    "extra-tensor": broken("The artefact holds {tensors}, which the reference does not have.", _MAKE),
    "other-shape": broken("{tensor} has the shape {found}; the reference's is {expected}.", _MAKE),
    "narrower-type": warning("{tensors} stored as {found}, the reference's as {expected}: some values are rounded."),
    "protected-type": broken("{tensor} is stored as {found}; converters leave it unquantized.", _CONVERT),
}  # fmt: skip
_WEIGHTS: Final[Mapping[str, Code]] = {
    "weights-not-finite": broken("{tensor} holds NaN or infinite values.", _MAKE),
    "weights-zero": broken("{tensor} is all zeros.", _MAKE),
    "weights-exchanged": broken("{tensor} and {other} are exchanged.", _MAKE),
    "weights-misplaced": broken("{tensor} holds the weights of {other}.", _MAKE),
    "weights-transposed": broken("{tensor} is transposed.", _MAKE),
    "bytes-swapped": broken("The two halves of each number of {tensor} are exchanged: it has another byte order.", _MAKE),
    "fused-parts-moved": broken("The three parts of {tensor} are in another order.", _MAKE),
    "rope-permuted": broken(
        "The rows of each head of {tensor} are interleaved, as converters do for other families: positions are wrong.",
        _MAKE,
    ),
    "rows-permuted": broken("The rows of {tensor} are the reference's in another order.", _MAKE),
    "columns-permuted": broken("The columns of {tensor} are the reference's in another order.", _MAKE),
    "layers-shifted": broken("{first} and the {count} layers in all hold the weights of the layer {step}.", _MAKE),
    "layer-repeated": broken("{layer} holds the weights of {other}.", _MAKE),
    "head-rows-exchanged": broken("The rows of yes and no are exchanged in {tensor}: every ranking is reversed.", _MAKE),
    "rows-exchanged": broken("Rows {first} and {second} of {tensor} are exchanged.", _MAKE),
    "head-rows-doubled": broken(
        "Both rows of {tensor} are that of {word}, so every document gets the same score.", _MAKE
    ),
    "head-other-rows": broken("The rank head holds the rows of {found}, expected yes and no.", _MAKE),
    "global-scale-inverted": broken("The global scale of {tensor} is inverted.", _QUANTIZE),
    "global-scale-misplaced": broken("{tensor} has the global scale of {other}.", _QUANTIZE),
    "weights-prescaled": warning(
        "The columns of {tensor} are scaled and {other} by the inverse, as AWQ does: the product is the reference's, and "
        "whether it is rounded rightly cannot be judged."
    ),
    "weights-scaled": broken("{tensor} is {factor} times the reference's.", _MAKE),
    "nibbles-swapped": broken("The two 4-bit codes of each byte of {tensor} are exchanged.", _QUANTIZE),
    "codes-twos-complement": broken(
        "The codes of {tensor} are two's complement, expected a sign and a magnitude: negative weights are wrong.",
        _QUANTIZE,
    ),
    "codes-renumbered": broken("The 4-bit codes of {tensor} are numbered otherwise than E2M1's.", _QUANTIZE),
    "block-scales-swizzled": broken(
        "The block scales of {tensor} are in the tiles of a kernel, expected row by row.", _QUANTIZE
    ),
    "block-scales-inverted": broken("The block scales of {tensor} are inverted.", _QUANTIZE),
    "block-scales-misplaced": broken("{tensor} has the block scales of another tensor.", _QUANTIZE),
    "block-scales-shifted": broken("The block scales of {tensor} are shifted by one block.", _QUANTIZE),
    "blocks-corrupt": broken(
        "{count} of {total} {unit} of {tensor} are not what rounding the reference gives: bytes are damaged, or a few "
        "weights were changed.",
        _MAKE,
    ),
    "weights-changed": broken(
        "{tensor} is near the reference's (relative error {error}), but {count} of {total} {unit} are not what rounding "
        "it gives: the weights were changed, or are another revision's.",
        _MAKE,
    ),
    "weights-revised": broken(
        "{count} of {total} matrices are near the reference's (relative error up to {error}) and not what rounding them "
        "gives: the weights are another revision's.",
        _FETCH,
    ),
    "scales-searched": note("{tensors} rounded under block scales that a search chose, not under those of the maxima."),
    "scales-not-as-declared": broken(
        "{tensors} rounded under other block scales than those of the maxima, which the artefact's recipe declares.",
        _QUANTIZE,
    ),
    "other-revision": broken(
        "Every tensor of {shard} differs from the reference and no other does: the file is from another revision.", _FETCH
    ),
    "other-projector": broken(
        "The vision tower of {name} is another model's: none of its matrices matches; they are {kinship}.", _CONVERT
    ),
    "other-weights": broken(
        "{count} of {total} matrices differ from the reference's; they are {kinship}.", _MAKE
    ),
    "weights-differ": broken(
        "{tensor} differs from the reference: its relative error is {error}; {format} allows {bound}.", _MAKE
    ),
    "weights-not-compared": note("{tensors} not compared: {reason}."),
}  # fmt: skip
_REDERIVED: Final[Mapping[str, Code]] = {
    "recipe-assumed": note("The artefact has no qtool.json with its recipe; {recipe} is assumed."),
    "tensors-not-rederived": broken(
        "{tensors} other bytes than making the artefact again gives: another base, another recipe, or damage."
    ),
    "tensors-stored-wider": note("{tensors} stored in a wider type than the file's own; the numbers are equal."),
    "files-not-rederived": warning("{names} other bytes than making the artefact again gives; all tensors are equal."),
    "fields-not-rederived": note("The metadata differ in {fields}; all tensors are equal."),
}  # fmt: skip
_PROMPT: Final[Mapping[str, Code]] = {
    "prompt-text-template": broken(
        "{question}: the model reads the text reranker's prompt, which llama.cpp's converter gives to every reranker.",
        "qtool repair-gguf {file} -o FIXED.gguf --task rerank",
    ),
    "prompt-vision-template": broken("{question}: the model reads the vision reranker's prompt, but it is a text model."),
    "prompt-missing-template": broken(
        "{question}: the model reads the bare query and document: the chat template is missing.",
        "qtool serve-command {file} --engine vllm",
    ),
    "prompt-other-instruction": broken("{question}: the model reads the instruction {found}, expected {expected}"),
    "prompt-no-instruction": broken("{question}: the model reads the official prompt without its instruction."),
    "prompt-truncated": broken("{question}: the prompt is cut to {found} of {expected} tokens."),
    "prompt-start-token": broken("{question}: {tokens} is added before the prompt."),
    "prompt-end-token": broken("{question}: {tokens} is added after the prompt, and the answer is read from there."),
    "prompt-lost-end": broken("{question}: {tokens} is missing at the end, so the answer is read from another token."),
    "prompt-other-tokenizer": broken("{question}: the tokenizer is another model's: the ids mean {found}"),
    "prompt-other-tokens": broken("{question}: the same text is split into other tokens, from token {place} on: {found}"),
    "prompt-differs": broken(
        "{question}: from token {place} on the model reads {found}; the reference reads {expected}"
    ),
    "prompt-pictures": broken("{question}: pictures become patches of {found}; the reference has {expected}."),
    "prompt-unknown": note(
        "{engine} does not report what the model reads, and {pairs} scores fit no known prompt: see the stage scores."
    ),
    "prompt-untold": note("{engine} does not report what the model reads; {pairs} scores fit the official prompt best."),
}  # fmt: skip

_FITTED, _SCORES = (
    {name: Code(Severity(severity), sentence, remedy) for name, (severity, sentence, remedy) in codes.items()}
    for codes in (FITTED_CODES, SCORE_CODES)
)

COMPARISON_CODES: Final[Mapping[str, Code]] = {
    **_CONFIG, **_FILES, **_CALIBRATION, **_TENSORS, **_WEIGHTS, **_FITTED, **_REDERIVED, **_PROMPT, **_SCORES,
}  # fmt: skip
"""Every code of a comparison, in the order of the documentation."""

CODES: Final[Mapping[str, Code]] = {**INSPECTION_CODES, **COMPARISON_CODES}
