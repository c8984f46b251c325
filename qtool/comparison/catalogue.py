"""Every code that the stages of a verification can give, beside those of an inspection.

Rule: as in the inspection's catalogue: a code keeps its meaning, the sentence says what goes wrong. `other-` codes are
differences from the reference, `weights-` codes compare values, `prompt-` codes what the model reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qtool.inspection.catalogue import Code, broken, note, stated, warning
from qtool.inspection.finding import Finding

_MAKE: Final = "qtool {maker} MODEL -o OUT"
_QUANTIZE: Final = "qtool quantize MODEL -o OUT"
_CONVERT: Final = "qtool convert-gguf MODEL -o OUT"
_FETCH: Final = "hf download ORG/NAME {name} --local-dir {file}"
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

CODES: Final[Mapping[str, Code]] = {**_CONFIG, **_FILES, **_TENSORS, **_WEIGHTS, **_REDERIVED, **_PROMPT}
"""Every code, in the order of the documentation."""


def finding(code: str, target: object, **facts: Any) -> Finding:
    """What `code` says of the artefact at `target`."""
    return stated(code, CODES[code], str(target), **{"maker": "quantize", "name": "'*'", **facts})
