"""What other tools write otherwise, and engines read the same, is no fault: no false alarms about folders."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest

from qtool.arch.prompts import FILE_NAME as RERANK_TEMPLATE
from qtool.checks.stage import Outcome
from tests.checks import surgery
from tests.checks.stages import check_structure, compare_weights, rederive
from tests.checks.surgery import Raw

ARTEFACTS = ("reranker/copy", "reranker/nvfp4", "embedder/nvfp4", "text-reranker/nvfp4", "reranker-shards/copy")
WITH_PICTURES = tuple(each for each in ARTEFACTS if not each.startswith("text"))
JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "config_sentence_transformers.json",
)
VARIANTS = []


def variant(*of):
    """Register a harmless change of the artefacts `of`, of which three are tried."""

    def register(change):
        chosen = random.Random(change.__name__).sample(of, min(len(of), 3))
        VARIANTS.extend((change, name, seed) for seed, name in enumerate(chosen))
        return change

    return register


@pytest.mark.parametrize(
    ("change", "name", "seed"), VARIANTS, ids=lambda value: getattr(value, "__name__", str(value)).replace("/", "-")
)
def test_what_engines_read_alike_passes(change, name, seed, builder, tmp_path):
    artefact = shutil.copytree(builder.good(name), tmp_path / "artefact")
    change(artefact, random.Random(seed))
    stage = check_structure(artefact, builder.reference(name.partition("/")[0]))
    assert (stage.outcome, [each.sentence for each in stage.findings]) == (Outcome.PASS, [])


def one_file(folder):
    """All weights of a folder, which loses its files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= surgery.read_weights(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return tensors


@variant("reranker/nvfp4", "text-reranker/nvfp4")
def quantized_cache_with_its_scales(folder, rng):
    def add(tensors):
        for name in [name for name in tensors if name.endswith(("k_proj.weight", "v_proj.weight"))]:
            letter = name[-len("k_proj.weight")]
            scale = np.array(rng.uniform(0.01, 2), np.float32).view(np.uint32)
            tensors[name.removesuffix("weight") + f"{letter}_scale"] = Raw("F32", scale)

    surgery.weights(folder, add)
    path = folder / "hf_quant_config.json"
    surgery.edit(path, lambda config: config["quantization"].update(kv_cache_quant_algo="FP8"))


@variant(*ARTEFACTS)
def shards_cut_otherwise(folder, rng):
    tensors = one_file(folder)
    names = list(tensors)
    rng.shuffle(names)
    weight_map = {}
    for number, part in enumerate(np.array_split(names, 3), start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        surgery.write_weights(folder / file, {each: tensors[each] for each in part.tolist()})
        weight_map |= dict.fromkeys(part.tolist(), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@variant(*ARTEFACTS)
def an_index_of_one_file(folder, rng):
    tensors = one_file(folder)
    surgery.write_weights(folder / "model.safetensors", tensors)
    index = {"metadata": {"total_size": rng.randrange(10)}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@variant(*ARTEFACTS)
def safetensors_in_an_unusual_order(folder, rng):
    """The header in another order than the data, without padding, with metadata behind the tensors."""
    for path in folder.glob("*.safetensors"):
        tensors = surgery.read_weights(path)
        names, header, position = sorted(tensors, key=lambda _: rng.random()), {}, 0
        for name in names:
            raw = tensors[name]
            end = position + raw.data.nbytes
            header[name] = {"shape": list(raw.data.shape), "data_offsets": [position, end], "dtype": raw.dtype}
            position = end
        shuffled = dict(sorted(header.items(), key=lambda _: rng.random()))
        text = json.dumps({**shuffled, "__metadata__": {"made": "by another tool"}}, separators=(",", ":")).encode()
        text += b" " * rng.randrange(3)
        data = b"".join(tensors[name].data.tobytes() for name in names)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@variant(*ARTEFACTS)
def json_in_another_order(folder, rng):
    for path in (folder / name for name in JSON_FILES):
        value = surgery.read_json(path)
        if isinstance(value, dict):
            value = dict(sorted(value.items(), key=lambda _: rng.random()))
        path.write_text(json.dumps(value, indent=rng.choice((None, 1, 4)), ensure_ascii=rng.random() < 0.5))


@variant(*ARTEFACTS)
def files_that_nobody_reads(folder, rng):
    for name in (
        "README.md",
        ".gitattributes",
        "LICENSE",
        "NOTICE.txt",
        "banner.png",
        "scripts/run.py",
        "onnx/model.onnx",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(rng.randbytes(9))
    (folder / "generation_config.json").unlink()


@variant("reranker/copy", "reranker/nvfp4", "embedder/nvfp4", "text-reranker/copy")
def config_saved_by_transformers_5(folder, _rng):
    from transformers import AutoConfig

    saved = AutoConfig.from_pretrained(folder)
    quantization = surgery.read_json(folder / "config.json").get("quantization_config")
    saved.quantization_config = None
    del saved.quantization_config
    saved.save_pretrained(folder)
    if quantization:
        surgery.config(folder, lambda config: config.update(quantization_config=quantization))


@variant(*ARTEFACTS)
def config_as_transformers_4_wrote_it(folder, _rng):
    def change(config):
        config["torch_dtype"] = config.pop("dtype")
        text = config.get("text_config", config)
        rope = text.pop("rope_parameters")
        text["rope_theta"] = int(rope.pop("rope_theta"))
        rope["type"] = rope.pop("rope_type")
        if len(rope) > 1:
            text["rope_scaling"] = rope
        config.update(use_cache=False, transformers_version="4.57.1", _name_or_path="elsewhere")
        text.update(sliding_window=None, max_window_layers=28, use_sliding_window=False)

    surgery.config(folder, change)


@variant(*ARTEFACTS)
def defaults_left_out(folder, _rng):
    def change(config):
        text = config.get("text_config", config)
        for field in ("attention_bias", "hidden_act", "rms_norm_eps"):
            text.pop(field)
        vision = config.get("vision_config", {})
        for field in ("hidden_act", "in_channels", "spatial_merge_size", "temporal_patch_size", "patch_size"):
            vision.pop(field, None)
        config.pop("transformers_version", None)

    surgery.config(folder, change)


@variant(*ARTEFACTS)
def tokenizer_saved_by_transformers_5(folder, _rng):
    from transformers import AutoTokenizer

    template = (folder / "chat_template.jinja").read_bytes()
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "chat_template.jinja").write_bytes(template)


@variant(*ARTEFACTS)
def tokenizer_that_takes_its_file_as_it_is(folder, rng):
    kind = rng.choice(("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2TokenizerFast"))
    surgery.edit(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class=kind))


@variant(*ARTEFACTS)
def vocabulary_in_files_of_its_own(folder, rng):
    model = surgery.read_json(folder / "tokenizer.json")["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "\n".join(each if isinstance(each, str) else " ".join(each) for each in model["merges"])
    )
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
    )

    tokens = surgery.read_json(folder / "tokenizer.json")["added_tokens"]
    (folder / "added_tokens.json").write_text(json.dumps({each["content"]: each["id"] for each in tokens[3:]}))

    def change(tokenizer):
        merges = tokenizer["model"]["merges"]
        tokenizer["model"]["merges"] = [each.split(" ") if isinstance(each, str) else " ".join(each) for each in merges]
        if rng.random() < 0.5:
            tokenizer["truncation"] = None

    surgery.edit(folder / "tokenizer.json", change)


@variant(*ARTEFACTS)
def template_in_the_tokenizer_config(folder, _rng):
    """Where transformers 4 kept it."""
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    surgery.edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template=template))


@variant(*ARTEFACTS)
def templates_with_other_line_ends(folder, rng):
    for path in folder.glob("*.jinja"):
        text = path.read_text().removesuffix("\n")
        path.write_bytes(rng.choice((text, f"{text}\n", text.replace("\n", "\r\n"))).encode())


@variant(*WITH_PICTURES)
def processors_in_one_file(folder, rng):
    """As transformers 5 writes them."""
    parts = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
    spelt_out = {"do_resize": True, "resample": 3, "rescale_factor": 1 / 255, "do_convert_rgb": True, "crop_size": None}
    own = {part: surgery.read_json(folder / name) | spelt_out for part, name in parts.items()}
    (folder / "processor_config.json").write_text(json.dumps({**own, "processor_class": "Qwen3VLProcessor"}))
    if rng.random() < 0.5:
        for name in parts.values():
            (folder / name).unlink()


@variant(*WITH_PICTURES)
def image_processor_of_transformers_4(folder, _rng):
    def change(config):
        size = config["size"]
        config["min_pixels"], config["max_pixels"] = size["shortest_edge"], size["longest_edge"]
        config["image_processor_type"] = "Qwen2VLImageProcessor"
        config["image_mean"] = [0.5, 0.5, 0.50]

    surgery.edit(folder / "preprocessor_config.json", change)


@variant("reranker/copy", "reranker/nvfp4", "embedder/nvfp4")
def side_files_of_sentence_transformers_5(folder, _rng):
    def rename(modules):
        for module in modules:
            name = module["type"].rpartition(".")[2]
            if name != "LogitScore":  # which was never anywhere else
                module["type"] = f"sentence_transformers.models.{name}"

    surgery.edit(folder / "modules.json", rename)
    versions = {"sentence_transformers": "5.1.0", "transformers": "4.57.1", "pytorch": "2.8.0"}
    surgery.edit(folder / "config_sentence_transformers.json", lambda config: config.update(__version__=versions))
    pooling = folder / "1_Pooling/config.json"
    if pooling.exists():
        modes = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
        flags = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in modes}
        width = surgery.read_json(pooling)["embedding_dimension"]
        pooling.write_text(json.dumps({"word_embedding_dimension": width, **flags, "include_prompt": True}))


@variant("reranker/nvfp4", "embedder/nvfp4", "text-reranker/nvfp4")
def scalars_of_one_element(folder, _rng):
    def change(tensors):
        for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
            tensors[name] = Raw("F32", tensors[name].data.reshape(1))

    surgery.weights(folder, change)


@variant("reranker/nvfp4", "embedder/nvfp4", "text-reranker/nvfp4")
def quantization_spelt_out(folder, rng):
    def change(config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(
            symmetric=True, strategy="tensor_group"
        )
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
        config["quantization_config"].update(kv_cache_scheme=None, format="nvfp4", group_size=16)
        rng.shuffle(config["quantization_config"]["ignore"])

    surgery.config(folder, change)


@variant(*ARTEFACTS)
def hidden_files(folder, rng):
    """As macOS, editors and git leave them; no engine looks at them."""
    for name in ("._model.safetensors", "._config.json", ".DS_Store", ".model.safetensors.swp", "..safetensors"):
        (folder / name).write_bytes(rng.randbytes(9))


@variant(*ARTEFACTS)
def every_field_of_any_config(folder, _rng):
    """As transformers 4 wrote the sections of some configs."""
    of_any = {
        "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}, "is_decoder": False, "tie_encoder_decoder": False,
        "cross_attention_hidden_size": None, "add_cross_attention": False, "max_length": 20, "do_sample": False, "top_k": 50,
        "num_beams": 1, "temperature": 1.0, "bad_words_ids": None, "forced_eos_token_id": None, "suppress_tokens": None,
        "begin_suppress_tokens": None, "return_dict": True, "is_encoder_decoder": False, "problem_type": None, "prefix": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "sep_token_id": None,
        "pad_token_id": None, "_attn_implementation_autoset": True, "task_specific_params": None, "tokenizer_class": None,
    }  # fmt: skip

    def change(config):
        for section in (config, config.get("text_config", config)):
            section.update({name: value for name, value in of_any.items() if name not in section})

    surgery.config(folder, change)


@variant("reranker/copy", "reranker/nvfp4", "embedder/nvfp4")
def picture_tokens_named(folder, rng):
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>"}
    place = rng.choice(("extra_special_tokens", "model_specific_special_tokens", ""))

    def change(config):
        config.pop("additional_special_tokens", None)
        config.update({place: tokens} if place else tokens)
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]

    surgery.edit(folder / "tokenizer_config.json", change)


@variant("reranker/copy", "reranker/nvfp4", "embedder/nvfp4")
def no_processor_named(folder, rng):
    """transformers takes the class of the model's family."""
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json"):
        surgery.edit(folder / name, lambda config: config.pop("processor_class", None))
    if rng.random() < 0.5:
        surgery.config(folder, lambda config: config.update(processor_class="Qwen3VLProcessor"))


@variant(*ARTEFACTS)
def kinds_of_layers_spelt_out(folder, _rng):
    def change(config):
        text = config.get("text_config", config)
        text["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
        text["pad_token_id"] = 753

    surgery.config(folder, change)


@variant("reranker/nvfp4")
def without_a_manifest(folder, _rng):
    """The chat template is the official one, so that nothing is missing."""
    (folder / "qtool.json").unlink()
    (folder / RERANK_TEMPLATE).unlink()


@variant("reranker/copy")
def tied_head_stored_too(folder, _rng):
    name = "model.language_model.embed_tokens.weight"
    surgery.weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[name]}))


@variant(*ARTEFACTS)
def links_into_a_cache(folder, _rng):
    """As the hub's cache keeps a snapshot."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(each for each in folder.rglob("*") if each.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


def test_a_scalar_of_one_element_is_read_and_rederived(builder, tmp_path):
    artefact, reference = (
        shutil.copytree(builder.good("reranker/nvfp4"), tmp_path / "artefact"),
        builder.reference("reranker"),
    )
    scalars_of_one_element(artefact, random.Random(0))
    assert compare_weights(artefact, reference)[0].outcome is Outcome.PASS
    assert rederive(artefact, reference, tmp_path)[0].outcome is Outcome.PASS
