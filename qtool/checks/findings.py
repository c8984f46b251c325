"""The catalogue of findings: every code, with its severity, its sentence and its remedy, as data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from qtool.storage.gguf_model import is_gguf

# One thing that an inspection has to say. A code to look up, one sentence to read, and where there is one the command
# that mends it.


_LONGEST: Final = 200


class Severity(str, Enum):
    """`broken` gives wrong answers or none, `warning` may, `note` is worth knowing."""

    BROKEN = "broken"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """`remedy` is a command, empty where there is nothing to mend."""

    code: str
    severity: Severity
    sentence: str
    remedy: str = ""


def printable(text: str, longest: int = _LONGEST) -> str:
    """What a stranger's file says, short, and without what a terminal would obey or an encoder refuse."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


# Every code that an inspection can give, with its severity, its sentence and its remedy, as data. A code keeps its
# meaning; the sentence says what goes wrong, not only what a field contains. Braces are facts of the case; `{target}`
# is what was inspected and `{file}` likewise, where it lies on this machine.


_LONGEST_COMMAND: Final = 5000
_REPAIR: Final = "qtool repair-gguf {file} -o FIXED.gguf --task {task}"
_REPAIR_FROM: Final = _REPAIR + " --base MODEL"
_CONVERT: Final = "qtool convert-gguf MODEL -o OUT"
_QUANTIZE: Final = "qtool quantize MODEL -o OUT"
_MAKE: Final = "qtool {maker} MODEL -o OUT"
_TASK: Final = "qtool inspect {target} --task {task}"
_FETCH: Final = "hf download ORG/NAME {name} --local-dir {file}"


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
    """What may."""
    return Code(Severity.WARNING, sentence, remedy)


def note(sentence: str, remedy: str = "") -> Code:
    """What is worth knowing."""
    return Code(Severity.NOTE, sentence, remedy)


_GGUF_FILE: Final[Mapping[str, Code]] = {
    "gguf-foreign": note("This is {what}, of which qtool knows nothing more."),
    "gguf-no-architecture": broken("The file does not name its architecture, and llama.cpp refuses it.", _CONVERT),
    "gguf-missing-part": broken(
        "The file is split into {count} parts, and {missing} is missing.",
        "hf download ORG/NAME {missing} --local-dir FOLDER",
    ),
    "gguf-part-count": broken("The parts hold {found} tensors, and their header promises {declared}.", _CONVERT),
    "gguf-missing-field": broken("llama.cpp refuses the file, since it lacks {field}.", _CONVERT),
    "gguf-missing-tensor": broken("llama.cpp refuses the file, since it lacks {tensors}.", _CONVERT),
    "gguf-tensor-shape": broken(
        "llama.cpp refuses the file, since {tensor} has the shape {found} and its fields make it {expected}.", _CONVERT
    ),
    "gguf-unknown-tensor": warning("The file holds {tensors}, which the architecture does not have.", _CONVERT),
}
_GGUF_TASK: Final[Mapping[str, Code]] = {
    "gguf-task-undeclared": warning(
        "Nothing in the file says that it is a reranker or an embedder: a reranker that was converted as a plain "
        "chat model looks just so; --task says what it should be{hint}.",
        _TASK,
    ),
    "gguf-no-pooling": broken(
        "No pooling type is set, so llama.cpp pools {expected} only where the caller asks for it.", _REPAIR
    ),
    "gguf-wrong-pooling": broken("llama.cpp pools {found}, and {doer} needs {expected}.", _REPAIR),
    "gguf-no-rank-head": broken(
        "The rank head cls.output.weight is missing, so every score is about 1e-20 and no error is given.", _REPAIR
    ),
    "gguf-head-shape": broken("The rank head has the shape {found}; rows yes and no make it {expected}.", _CONVERT),
    "gguf-head-quantized": broken(
        "The rank head is stored as {type}: two rows that every score hangs on, at {bits:.3g} bits.", _REPAIR_FROM
    ),
    "gguf-head-8-bit": warning(
        "The rank head is stored as {type}: its error is in every score, and 16 bits would cost next to nothing.",
        _REPAIR_FROM,
    ),
    "gguf-head-exchanged": broken(
        "The rows of the rank head are [no, yes], and llama.cpp ranks by the first: the best document comes last.",
        _REPAIR,
    ),
    "gguf-labels": broken(
        "The labels of the rank head are {found}, not [yes, no]: the score is not the probability of yes.", _REPAIR
    ),
    "gguf-no-rerank-template": broken(
        "There is no rerank template, so llama.cpp joins query and document as the model never saw them.", _REPAIR
    ),
    "gguf-wrong-rerank-template": broken(
        "The rerank template is {whose}: scores drift from the official ones.", _REPAIR
    ),
    "gguf-incomplete-rerank-template": broken("The rerank template leaves out {{{side}}}.", _REPAIR),
    "gguf-unknown-rerank-template": warning(
        "The rerank template is not the official one, and scores drift from the official ones.", _REPAIR
    ),
    "gguf-own-instruction": note("The rerank template has an instruction of its own: {instruction}"),
}
_GGUF_TOKENIZER: Final[Mapping[str, Code]] = {
    "gguf-tokenizer": broken("The tokenizer's {field} is {found}; the family's is {expected}.", _CONVERT),
    "gguf-pre-tokenizer": broken(
        "The pre-tokenizer is {found}, not qwen2, so text is split otherwise than the model was trained with.", _CONVERT
    ),
    "gguf-no-yes-no-token": broken(
        "The vocabulary has no token {word}, so its rank head cannot be the official one.", _CONVERT
    ),
    "gguf-prompt-token": broken(
        "{token} of the official prompt is no special token here and falls apart into several.", _CONVERT
    ),
    "gguf-start-token": broken("llama.cpp puts a token before every text, which the family does not.", _CONVERT),
    "gguf-end-token": broken("{problem}, and the embedding is taken from another token than it should be.", _CONVERT),
}
_GGUF_POSITIONS: Final[Mapping[str, Code]] = {
    "gguf-rope": broken("The rotary embedding is wrong: {problem}.", _CONVERT),
    "gguf-rope-scaling": warning(
        "Positions are scaled ({found}), which no published model of the family does.", _CONVERT
    ),
    "gguf-deepstack": broken("Pictures lose their deepstack features: {problem}.", _CONVERT),
}
_PROJECTOR: Final[Mapping[str, Code]] = {
    "mmproj-missing": warning("No vision projector lies beside it: text works, pictures do not.", _CONVERT),
    "mmproj-unreadable": broken("The projector {projector} cannot be read: {problem}", _CONVERT),
    "mmproj-type": broken("{projector} is a projector of type {found}, not {expected}.", _CONVERT),
    "mmproj-width": broken("{projector} gives vectors of {found}, the language model takes {expected}.", _CONVERT),
    "mmproj-deepstack": broken(
        "{projector} has {found} deepstack layers, the language model takes {expected}.", _CONVERT
    ),
    "mmproj-deepstack-flags": broken(
        "The layers flagged for deepstack are {flagged}, the file has mergers for {found}.", _CONVERT
    ),
    "mmproj-missing-field": broken("llama.cpp refuses the projector, since it lacks {field}.", _CONVERT),
    "mmproj-missing-tensor": broken("llama.cpp refuses the projector, since it lacks {tensors}.", _CONVERT),
    "mmproj-tensor-shape": broken(
        "The projector's {tensor} has the shape {found} and its fields make it {expected}.", _CONVERT
    ),
}
_NVFP4: Final[Mapping[str, Code]] = {
    "nvfp4-missing-scale": broken(
        "{tensors} missing, which no engine notices: the weights are read at a wrong scale.", _MAKE
    ),
    "nvfp4-no-scales": warning(
        "No NVFP4 tensor has a global scale: right if llama.cpp quantized the file, wrong if it came from ModelOpt.",
        _CONVERT,
    ),
    "nvfp4-scales-ignored": warning(
        "llama.cpp (seen up to {build}) ignores the feed-forward scales of {architecture}: scores of this file are wrong "
        "there, or not finite.",
        _CONVERT + " --outtype q8_0",
    ),
    "nvfp4-scale-type": broken("{tensor} is stored as {found}, NVFP4 needs {expected}.", _QUANTIZE),
    "nvfp4-scale-shape": broken("{tensor} has the shape {found}, its weight needs {expected}.", _QUANTIZE),
    "nvfp4-bad-scale": broken("{tensor} is {value}, which is no scale.", _MAKE),
    "nvfp4-unequal-scales": broken(
        "The global scales of {group} differ, and vLLM takes the largest for all without rescaling.", _QUANTIZE
    ),
    "nvfp4-unequal-source": note(
        "The global scales of {group} differ: llama.cpp does not mind, but in vLLM the source scores wrong.", _QUANTIZE
    ),
    "nvfp4-scales-unread": note("The global scales lie too far apart to be read from here; fetch the model first."),
    "nvfp4-partial-group": broken("Only part of {group} is quantized, and engines merge it into one.", _QUANTIZE),
    "nvfp4-quantized-head": broken("{module} is quantized, and no engine reads it so.", _QUANTIZE),
    "nvfp4-activations": note("Activations are quantized too ({algorithm}); qtool verifies weights only."),
    "nvfp4-no-quantization-config": broken(
        "config.json has no quantization_config, so vLLM takes the packed weights for plain ones.", _QUANTIZE
    ),
    "nvfp4-no-hf-quant-config": warning(
        "hf_quant_config.json is missing, which TensorRT-LLM and older engines read.", _QUANTIZE
    ),
    "nvfp4-config-mismatch": broken("config.json and hf_quant_config.json differ in {field}.", _QUANTIZE),
    "nvfp4-group-size": broken("The declared block size is {found}; NVFP4 has 16.", _QUANTIZE),
    "excluded-modules-pattern": broken(
        "The vision tower is not excluded as {expected}, the one pattern that both vLLM and SGLang match.", _QUANTIZE
    ),
    "excluded-modules-missing": broken(
        "{modules} stored unquantized without being excluded, so engines expect packed weights there.", _QUANTIZE
    ),
    "excluded-modules-packed": broken(
        "{modules} packed though excluded, so engines take the packed bytes for weights.", _QUANTIZE
    ),
}
_CHECKPOINT: Final[Mapping[str, Code]] = {
    "safetensors-foreign": note("This is {what}, of which qtool knows nothing more."),
    "safetensors-task-undeclared": warning(
        "Nothing declares whether it is a reranker or an embedder; --task says it.",
        "qtool inspect {target} --task rerank",
    ),
    "safetensors-missing-tensor": broken("{tensors} missing.", _FETCH),
    "safetensors-unknown-tensor": broken("The checkpoint holds {tensors}, which the architecture does not have."),
    "safetensors-tensor-shape": broken("{tensor} has the shape {found}; config.json makes it {expected}."),
    "safetensors-tensor-type": broken("{tensor} is stored as {found}, which is no type of weights here."),
    "safetensors-rope": broken("The rotary embedding is wrong: {problem}.", _FETCH),
    "safetensors-deepstack": broken("Pictures lose their deepstack features: {problem}.", _FETCH),
    "safetensors-pooling": broken("sentence-transformers pools {found}; the family pools the last token.", _FETCH),
    "safetensors-pre-tokenizer": broken(
        "tokenizer.json splits text otherwise than Qwen2's does: the model sees other tokens than in training.", _FETCH
    ),
    "safetensors-no-yes-no-token": broken(
        "The vocabulary has no token {word}, so the model cannot answer with it.", _FETCH
    ),
    "safetensors-answer-ids": broken(
        "{path} takes the ids {found} for yes and no, the tokenizer has {expected}.", _FETCH
    ),
    "safetensors-missing-tokenizer": broken("There is no tokenizer, so nothing can be scored.", _FETCH),
    "safetensors-missing-tokenizer-config": warning(
        "tokenizer_config.json is missing: padding side and special tokens are then guessed.", _FETCH
    ),
    "safetensors-missing-chat-template": warning(
        "There is no chat template: vLLM and sentence-transformers then score the bare texts.", _FETCH
    ),
    "safetensors-missing-preprocessor": warning(
        "preprocessor_config.json is missing: engines cannot prepare pictures.", _FETCH
    ),
    "safetensors-missing-modules-json": warning(
        "modules.json is missing: sentence-transformers then builds a fresh, random head.", _FETCH
    ),
    "safetensors-missing-module": warning(
        "modules.json names {path}, which is missing: sentence-transformers cannot load the model.", _FETCH
    ),
    "safetensors-missing-sentence-transformers-config": warning(
        "{name} is missing: sentence-transformers does not know {purpose}.", _FETCH
    ),
}

INSPECTION_CODES: Final[Mapping[str, Code]] = {
    **_GGUF_FILE, **_GGUF_TASK, **_GGUF_TOKENIZER, **_GGUF_POSITIONS, **_PROJECTOR, **_NVFP4, **_CHECKPOINT,
}  # fmt: skip
"""Every code, in the order of the documentation."""


def _stated(code: str, target: str, **facts: Any) -> Finding:
    meaning = CODES[code]
    is_remote = target.startswith("hf://")
    known = {"target": shlex.quote(target), "file": "FILE" if is_remote else shlex.quote(target)}
    known |= {name: printable(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}
    remedy = printable(meaning.remedy.format(**known), _LONGEST_COMMAND)
    return Finding(code, meaning.severity, meaning.sentence.format(**known), remedy)


def listed(names: Sequence[str]) -> str:
    """The first of `names` and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def listed_are(names: Sequence[str]) -> str:
    """Likewise, as the subject of a sentence with its verb."""
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"


# Every code that the stages of a verification can give, beside those of an inspection. As in the inspection's
# catalogue: a code keeps its meaning, the sentence says what goes wrong. `other-` codes are differences from the
# reference, `weights-` codes compare values, `prompt-` codes what the model reads.


_HAS: Final = "{field} is {found}, the reference has {expected}"

_CONFIG: Final[Mapping[str, Code]] = {
    "unreadable": broken("The comparison cannot go on: {problem}"),
    "other-architecture": broken("It is a {found}, the reference a {expected}."),
    "other-size": broken(f"The model has other sizes: {_HAS}.", _MAKE),
    "other-rope": broken(f"Positions are turned otherwise: {_HAS}.", _MAKE),
    "other-epsilon": broken(f"Norms are computed otherwise: {_HAS}.", _MAKE),
    "other-deepstack": broken(f"Pictures enter the decoder otherwise: {_HAS}.", _MAKE),
    "other-token-ids": broken(f"Pictures are looked for at another token: {_HAS}.", _MAKE),
    "other-tying": broken(f"Another matrix is the head: {_HAS}.", _MAKE),
    "other-config": broken(f"The model computes otherwise: {_HAS}.", _MAKE),
    "other-length": warning(f"Long inputs are cut elsewhere: {_HAS}.", _MAKE),
    "nothing-quantized": broken(
        "config.json declares {algorithm}, but no weight is packed: engines take plain weights for packed ones.",
        _QUANTIZE,
    ),
    "mostly-unquantized": warning(
        "Only {found} of {expected} quantizable weights are packed: it is larger than it need be."
    ),
}
_FILES: Final[Mapping[str, Code]] = {
    "other-tokenizer": broken("The tokenizer is another model's: {problem}.", _MAKE),
    "added-token-missing": broken(
        "{tokens} no added token here as in the reference, so its text falls apart into several tokens.", _MAKE
    ),
    "other-tokenizer-rules": broken("Text is cut into tokens otherwise: {part} differs from the reference's.", _MAKE),
    "other-padding-side": broken(
        "Batches are padded on the {found}, the reference pads on the {expected}: the official code and "
        "sentence-transformers then read another position.",
        _FETCH,
    ),
    "other-special-tokens": warning(f"Special tokens are declared otherwise: {_HAS}.", _MAKE),
    "missing-side-file": broken("{name} is missing, which the reference has: {effect}.", _FETCH),
    "other-side-file": broken("{name} is not the reference's: {effect}.", _FETCH),
    "other-minor-file": warning("{name} is not the reference's."),
    "other-instruction": broken(
        "The baked instruction is not the publisher's, and nothing declares that it was meant so: {instruction}", _CONVERT
    ),
    "other-rerank-template": broken("rerank_template.jinja does not render the official prompt for vLLM.", _QUANTIZE),
    "other-chat-template": warning("{field} is not the reference's.", _CONVERT),
}  # fmt: skip
_TENSORS: Final[Mapping[str, Code]] = {
    "missing-tensor": broken("{tensors} missing, which the reference has.", _MAKE),
    "missing-head": broken(
        "The head lm_head.weight is missing, and none is tied: engines answer from random weights, or not at all.", _MAKE
    ),
    "extra-tensor": broken("There is {tensors}, which the reference does not have.", _MAKE),
    "other-shape": broken("{tensor} has the shape {found}, the reference's is {expected}.", _MAKE),
    "narrower-type": warning("{tensors} stored as {found}, the reference's as {expected}: not every value survives."),
    "protected-type": broken("{tensor} is stored as {found}, and a converter leaves it unquantized.", _CONVERT),
}  # fmt: skip
_WEIGHTS: Final[Mapping[str, Code]] = {
    "weights-not-finite": broken("{tensor} holds NaN or infinite values.", _MAKE),
    "weights-zero": broken("{tensor} is all zeros.", _MAKE),
    "weights-exchanged": broken("{tensor} and {other} are exchanged.", _MAKE),
    "weights-misplaced": broken("{tensor} holds the weights of {other}.", _MAKE),
    "layer-repeated": broken("{layer} holds the weights of {other}.", _MAKE),
    "head-rows-exchanged": broken("The rows of yes and no are exchanged in {tensor}: every ranking is upside down.", _MAKE),
    "rows-exchanged": broken("Rows {first} and {second} of {tensor} are exchanged.", _MAKE),
    "head-other-rows": broken("The rank head holds the rows of {found} instead of yes and no.", _MAKE),
    "global-scale-inverted": broken("The global scale of {tensor} is its own inverse.", _QUANTIZE),
    "weights-scaled": broken("{tensor} is {factor} times what it should be.", _MAKE),
    "nibbles-swapped": broken("The two codes of each byte are exchanged in {tensor}.", _QUANTIZE),
    "block-scales-shifted": broken("The block scales of {tensor} lie one block off.", _QUANTIZE),
    "blocks-corrupt": broken(
        "{count} of {total} {unit} of {tensor} are not what rounding the reference gives: bytes were damaged.", _MAKE
    ),
    "blocks-otherwise-rounded": warning(
        "{count} of {total} {unit} of {tensor} are not rounded to nearest: another algorithm made them, or damage that "
        "its tolerance hides."
    ),
    "other-revision": broken(
        "Every tensor of {shard} differs from the reference and no other does: that file is of another revision.", _FETCH
    ),
    "other-projector": broken("The vision tower of {name} is another model's: none of its matrices fits.", _CONVERT),
    "weights-differ": broken(
        "{tensor} is not the reference's: its relative error is {error}, and {format} allows {bound}.", _MAKE
    ),
    "weights-not-compared": note("{tensors} not compared: {reason}."),
}  # fmt: skip
_REDERIVED: Final[Mapping[str, Code]] = {
    "recipe-assumed": note("No qtool.json says how it was made; the recipe {recipe} is assumed."),
    "tensors-not-rederived": broken(
        "{tensors} other bytes than quantizing the reference again gives: another base, another recipe, or damage."
    ),
    "files-not-rederived": warning("{names} other bytes than quantizing the reference again gives, though no tensor has."),
    "fields-not-rederived": note("The metadata differ in {fields}; no tensor does."),
}  # fmt: skip
_PROMPT: Final[Mapping[str, Code]] = {
    "prompt-text-template": broken(
        "{question}: the model reads the text reranker's prompt, which llama.cpp's converter gives to every reranker.",
        "qtool repair-gguf {file} -o FIXED.gguf --task rerank",
    ),
    "prompt-vision-template": broken("{question}: the model reads the vision reranker's prompt, and it is a text model."),
    "prompt-missing-template": broken(
        "{question}: the model reads query and document bare: the chat template is missing.",
        "qtool serve-command {file} --engine vllm",
    ),
    "prompt-other-instruction": broken("{question}: the model reads the instruction {found} instead of {expected}"),
    "prompt-truncated": broken("{question}: the prompt is cut to {found} of {expected} tokens."),
    "prompt-start-token": broken("{question}: {tokens} stands before the prompt."),
    "prompt-end-token": broken("{question}: {tokens} stands behind the prompt, and the answer is read from there."),
    "prompt-lost-end": broken("{question}: {tokens} is missing at the end, and the answer is read from another token."),
    "prompt-other-tokenizer": broken("{question}: the tokenizer is another model's: the ids mean {found}"),
    "prompt-other-tokens": broken("{question}: the same text is cut into other tokens, from token {place} on: {found}"),
    "prompt-differs": broken(
        "{question}: from token {place} on the model reads {found} and the reference {expected}"
    ),
    "prompt-pictures": broken("{question}: pictures become patches of {found}, in the reference of {expected}."),
    "prompt-untold": note("{engine} does not tell what the model reads; {pairs} scores fit the official prompt best."),
}  # fmt: skip

COMPARISON_CODES: Final[Mapping[str, Code]] = {**_CONFIG, **_FILES, **_TENSORS, **_WEIGHTS, **_REDERIVED, **_PROMPT}
"""Every code, in the order of the documentation."""


CODES: Final[Mapping[str, Code]] = {**INSPECTION_CODES, **COMPARISON_CODES}


def finding(code: str, target: object, **facts: Any) -> Finding:
    """What `code` says of the artefact at `target`."""
    maker = "convert-gguf" if is_gguf(str(target)) else "quantize"
    return _stated(code, str(target), **{"maker": maker, "name": "'*'", **facts})
