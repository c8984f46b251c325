"""Write a trained demo model as the Hugging Face checkpoint that it is.

Rule: one file of bf16 weights under the names of the real checkpoints, and no tied duplicate.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3VLForConditionalGeneration

from qtool import resources
from qtool.demo.sidecars import chat_template, json_files


def model_folder(task: str, parent: Path | None = None) -> Path:
    """Where a task's model lies: in `parent`, or where it comes with qtool."""
    name = f"qtool-demo-{task}"
    return parent / name if parent else resources.demo_model(name)


def write_model(model: Qwen3VLForConditionalGeneration, tokenizer: Tokenizer, task: str, folder: Path) -> None:
    """Write the weights, rounded to bf16, and every side file but the card, which carries measurements."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_sidecars(tokenizer, task, folder)


def read_model(folder: Path) -> Qwen3VLForConditionalGeneration:
    """The model of a checkpoint folder in float32, to train on."""
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def write_sidecars(tokenizer: Tokenizer, task: str, folder: Path) -> None:
    """Write tokenizer, configs and template; indented by two, as the official repositories' files are."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template(task), encoding="utf-8")
    for name, content in json_files(tokenizer, task).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
