"""The prompt that a GGUF reranker carries: `tokenizer.chat_template.rerank`.

Rule: it comes from the official prompt's data; llama.cpp replaces `{query}` and `{document}` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from qtool.arch.prompts import TEXT_RERANKER, PromptSpec
from qtool.errors import UsageError
from qtool.gguf_file.values import Kind, Value, array, string
from qtool.jsonfile import read_json

PromptChoice = Literal["official", "llamacpp"]
PROMPTS: Final[tuple[PromptChoice, ...]] = ("official", "llamacpp")

RERANK_KEY: Final = "tokenizer.chat_template.rerank"
NAMES_KEY: Final = "tokenizer.chat_templates"
DEFAULT_KEY: Final = "tokenizer.chat_template"

_SIDES: Final = ("{query}", "{document}")


def rank_prompt(official: PromptSpec, choice: PromptChoice, instruction: str | None) -> str:
    """The template to bake; `llamacpp` is what llama.cpp's converter gives to every reranker, the text family's."""
    prompt = TEXT_RERANKER if choice == "llamacpp" else official
    chosen = instruction or prompt.default_instruction
    if any(side in chosen for side in _SIDES):
        raise UsageError("--instruction contains {query} or {document}, which llama.cpp would replace.")
    return prompt.template.replace("{instruction}", chosen)


def baked_instruction(template: str, prompt: PromptSpec) -> str | None:
    """The instruction in a rank template that is otherwise `prompt`'s; None when it is another prompt."""
    before, after = prompt.template.split("{instruction}")
    is_this = template.startswith(before) and template.endswith(after) and len(template) >= len(before) + len(after)
    return template[len(before) : len(template) - len(after)] if is_this else None


def template_metadata(directory: Path, rank_template: str | None) -> Mapping[str, Value]:
    """The chat templates of the checkpoint, by name where there are several, and the rank template beside them."""
    named = _named_templates(directory)
    if rank_template is not None:
        named["rerank"] = rank_template
    default = named.pop("default", None)
    fields = {f"{DEFAULT_KEY}.{name}": string(template) for name, template in named.items()}
    if named:
        fields[NAMES_KEY] = array(Kind.STRING, sorted(named))
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
