"""Every code that an inspection can give, with its severity, its sentence and its remedy, as data.

Rule: a code keeps its meaning; the sentence says what goes wrong, not only what a field contains. Braces are facts of
the case; `{target}` is what was inspected and `{file}` likewise, where it lies on this machine.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qtool.gguf_file.ignored_scales import SEEN_IN
from qtool.inspection.finding import Finding, Severity, printable

_LONGEST_COMMAND: Final = 5000
_REPAIR: Final = "qtool repair-gguf {file} -o FIXED.gguf --task {task}"
_REPAIR_FROM: Final = _REPAIR + " --base MODEL"
_CONVERT: Final = "qtool convert-gguf MODEL -o OUT"
_QUANTIZE: Final = "qtool quantize MODEL -o OUT"
_REMAKE: Final = "qtool {maker} MODEL -o OUT"
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
        "{tensors} missing, which no engine notices: the weights are read at a wrong scale.", _REMAKE
    ),
    "nvfp4-no-scales": warning(
        "No NVFP4 tensor has a global scale: right if llama.cpp quantized the file, wrong if it came from ModelOpt.",
        _CONVERT,
    ),
    "nvfp4-scales-ignored": warning(
        f"llama.cpp (seen up to {SEEN_IN}) ignores the feed-forward scales of qwen3vl: there, scores of this file are wrong "
        "or no numbers.",
        _CONVERT + " --outtype q8_0",
    ),
    "nvfp4-scale-type": broken("{tensor} is stored as {found}, NVFP4 needs {expected}.", _QUANTIZE),
    "nvfp4-scale-shape": broken("{tensor} has the shape {found}, its weight needs {expected}.", _QUANTIZE),
    "nvfp4-bad-scale": broken("{tensor} is {value}, which is no scale.", _REMAKE),
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

CODES: Final[Mapping[str, Code]] = {
    **_GGUF_FILE, **_GGUF_TASK, **_GGUF_TOKENIZER, **_GGUF_POSITIONS, **_PROJECTOR, **_NVFP4, **_CHECKPOINT,
}  # fmt: skip
"""Every code, in the order of the documentation."""


def finding(code: str, target: str, **facts: Any) -> Finding:
    """What `code` says of `target`."""
    return stated(code, CODES[code], target, **facts)


def stated(code: str, meaning: Code, target: str, **facts: Any) -> Finding:
    """Likewise for a code of any catalogue."""
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
