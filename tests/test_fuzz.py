"""Whatever a file or a server says, each parser answers or refuses in words; `make fuzz` tries thousands of cases of each."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qtool import resources
from qtool.arch.detect import detect
from qtool.arch.spec import Task
from qtool.errors import QtoolError, UsageError
from qtool.inputs.datasets import parse_dataset
from qtool.inputs.items import Item, Pair
from qtool.inputs.panels import PanelShard, load_panel, read_text_bytes
from qtool.inputs.pictures import load_image
from qtool.jsonfile import JsonError, json_value, read_json
from qtool.options import parse_size
from qtool.recipe import load_recipe, parse_recipe
from qtool.scoring.http import client as http_client
from qtool.scoring.http.detect import ServerKind, detect_server
from qtool.scoring.http.engine import ids_of, probabilities_as_log_odds, scores_of, tokens_read, vector_of
from qtool.scoring.joined_ledgers import read_ledgers
from qtool.scoring.ledger import answer_line, header_line, open_ledger
from qtool.scoring.scorer import Identity
from qtool.scoring.tokenizer import PromptTokenizer
from qtool.storage.checkpoint import open_checkpoint
from qtool.verify.merge import merge_runs, read_report
from tests.fuzzing import changed_bytes, changed_json, changed_text, fuzz, rarely
from tests.scoring import tiny

SEEDS = st.integers(0, 1 << 48)
IDENTITY = Identity("engine 1", "model", "prompt", "float32")
ITEMS = [Item(f"d{n}", (f"text {n}",)) for n in range(3)]
PAIR = Pair(Item("q", ("which?",)), ITEMS[0])


@contextlib.contextmanager
def answered_or_refused(seconds=5):
    """Nothing but QtoolError may come, soon, with a message that says something and can be shown."""
    began = time.perf_counter()
    refusal = None
    try:
        yield
    except QtoolError as error:
        refusal = error
    if refusal is not None:
        text = refusal.message + refusal.hint
        assert refusal.message
        assert "None." not in text
        assert all(c.isprintable() or c in "\n\t\u00a0\u3000" for c in text), ascii(text)
        assert refusal.exit_code in (2, 3)
    assert time.perf_counter() - began < seconds


class Files(dict):
    """Contents by path, which hypothesis would print whole."""

    def __repr__(self):
        return f"{len(self)} files"


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    return folder


# Panels, recipes, texts, options.

QUERY = {
    "id": "q1",
    "query": {"text": "which?", "image": ["red.png"], "min_pixels": 4096, "max_pixels": 65536},
    "instruction": "Judge.",
    "documents": [
        {"id": "a", "text": ["one", "two"], "label": 1},
        {
            "text": "x",
            "video": [{"frames": ["red.png", "red.png"], "max_frames": 2}],
            "total_pixels": 9999,
            "label": 0.5,
        },
        {"image": "red.png", "video": {"file": "red.png", "fps": 1.5}, "label": 0},
    ],
}
HEADER = {"qtool_panel": 1, "name": "n", "license": "MIT", "modality": "mixed", "labels": "graded", "sha256": "0" * 64}
RECIPE = resources.path("recipes/nvfp4-w4a16.yaml").read_bytes()
YAML = (
    b"2024-99-99",
    b"!!int ''",
    b"!!float x",
    b"!!binary '!'",
    b"0x_",
    b"1:99:99",
    b"&a [*a]",
    b"[" * 3000,
    b"? [a]",
)


@fuzz
@given(content=st.binary(max_size=300), text=st.text(max_size=100))
def test_any_bytes(content, text, folder):
    for data in (content, text.encode("utf-8", "surrogatepass")):
        path = written(folder, "any", data)
        for parse in (read_json, load_panel, lambda path: read_text_bytes(path, "texts"), load_image):
            with answered_or_refused():
                parse(path)
        with answered_or_refused():
            load_recipe(str(written(folder, "any.yaml", data)))
        for identity in (IDENTITY, None):
            with answered_or_refused():
                if identity is None:
                    read_ledgers([path], Task.RERANK)
                else:
                    open_ledger(path, identity).close()
        written(folder, "report.json", data)
        with answered_or_refused():
            read_report(folder)
    for parse in (PanelShard.parse, parse_size, parse_recipe, lambda text: parse_dataset(text, text)):
        with answered_or_refused():
            parse(text)


@fuzz
@given(SEEDS)
def test_panels(folder, seed):
    lines = [json.dumps(HEADER).encode(), json.dumps(QUERY).encode()]
    for content in (
        changed_text(QUERY, seed),
        changed_text(HEADER, seed) + b"\n" + lines[1],
        changed_bytes(b"\n".join(lines), seed),
        changed_bytes(lines[1], seed),
    ):
        with answered_or_refused():
            load_panel(written(folder, "panel.jsonl", content))


@fuzz
@given(SEEDS)
def test_recipes(seed):
    content = changed_bytes(RECIPE, seed).replace(b"min:", b"min: " + YAML[seed % len(YAML)], seed % 2)
    with answered_or_refused():
        parse_recipe(content.decode("utf-8", "replace"))
    with answered_or_refused():
        parse_recipe(YAML[seed % len(YAML)].decode() + RECIPE.decode()[seed % 200 :])


@fuzz
@given(SEEDS, st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "EPS", "PCX", "ICO", "TGA", "PPM"]))
def test_pictures(seed, kind):
    target = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(target, kind)
    content = changed_bytes(target.getvalue(), seed)
    for source in (f"data:image/x;base64,{base64.b64encode(content).decode()}", "data:" + content.decode("latin-1")):
        with answered_or_refused():
            load_image(source)


# Ledgers and reports.


def ledger(answers) -> bytes:
    lines = [answer_line(f"k{n}", question, answer) for n, (question, answer) in enumerate(answers)]
    return header_line(IDENTITY) + b"".join(lines)


SCORES = ledger([(Pair(PAIR.query, item), 0.5) for item in ITEMS])
VECTORS = ledger([(item, np.full(4, 0.5, np.float32)) for item in ITEMS])


@fuzz
@given(SEEDS, st.sampled_from([SCORES, VECTORS]))
def test_ledgers(folder, seed, content):
    lines = content.splitlines()
    place = seed % len(lines)
    lines[place] = changed_text(json.loads(lines[place]), seed)
    for damaged in (b"\n".join(lines) + b"\n", changed_bytes(content, seed)):
        with answered_or_refused(), open_ledger(written(folder, "ledger.jsonl", damaged), IDENTITY) as opened:
            opened.write("new", PAIR, 1.0)
        path = written(folder, "ledger.jsonl", damaged)
        for task in Task:
            with answered_or_refused():
                known = read_ledgers([path], task)
                known.score([PAIR]) if task is Task.RERANK else known.embed(ITEMS)


REPORT = Path(__file__).parent / "verify" / "report-v2.json"


@fuzz
@given(SEEDS)
def test_reports(folder, seed):
    report = json.loads(REPORT.read_bytes())
    for content in (changed_text(report, seed), changed_bytes(REPORT.read_bytes(), seed)):
        written(folder, "report.json", content)
        with answered_or_refused():
            read_report(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two finished shards of one verification, and the lines of their reports and ledgers."""
    from qtool.reporting.run import verify
    from qtool.verify.case import VerifyOptions

    root = tmp_path_factory.mktemp("shards")
    one = tiny.write_text(root / "one")
    documents = [{"text": f"ball {m}", "label": m} for m in range(3)]
    lines = [{"id": f"q{n}", "query": f"which ball {n}?", "documents": documents} for n in range(4)]
    (root / "panel.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for index in (1, 2):
        options = {
            "artefact": str(one),
            "reference": str(one),
            "task": Task.RERANK,
            "use_cache": False,
            "device": "cpu",
        }
        shard = VerifyOptions(
            **options,
            panels=(str(root / "panel.jsonl"),),
            shard=PanelShard(index, 2),
            noise_queries=1,
            output=root / f"shard{index}",
        )
        verify(shard)
    files = [path for path in (root / "shard1").rglob("*.json*") if path.is_file()]
    return root, Files({path: path.read_bytes() for path in files})


@rarely(5)
@given(SEEDS)
def test_merges_of_shards(shards, seed):
    from qtool.reporting.write import write_reports

    root, files = shards
    path = sorted(files)[seed % len(files)]
    content = files[path]
    if path.suffix == ".jsonl":
        lines = content.splitlines()
        place = seed // 7 % len(lines)
        lines[place] = changed_text(json.loads(lines[place]), seed)
        damaged = b"\n".join(lines) + b"\n"
    else:
        damaged = changed_text(json.loads(content), seed)
    try:
        path.write_bytes(damaged)
        with answered_or_refused(20):
            write_reports(merge_runs([root / "shard1", root / "shard2"], root / "merged", force=True), root / "merged")
    finally:
        path.write_bytes(content)


# Checkpoints: what scoring and planning read before a weight.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tiny.write_text(tmp_path_factory.mktemp("checkpoint") / "model")
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "a.Transformer"}]))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    return folder, Files({path: path.read_bytes() for path in folder.iterdir() if path.is_file()})


def readers(folder):
    return (
        lambda: open_checkpoint(folder),
        lambda: detect(folder).require_task(),
        lambda: PromptTokenizer.read(folder).encode("yes no"),
    )


@fuzz
@given(SEEDS)
def test_checkpoints(checkpoint, seed):
    folder, files = checkpoint
    path = sorted(files)[seed % len(files)]
    content = files[path]
    for damaged in (changed_bytes(content, seed), _changed_file(path, content, seed)):
        try:
            path.write_bytes(damaged)
            for read in readers(folder):
                with answered_or_refused():
                    read()
        finally:
            path.write_bytes(content)


def _changed_file(path, content, seed):
    if path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = changed_text(json.loads(content[8 : 8 + length]), seed)
        claimed = (len(header), 1 << 40, (1 << 63) - 1, 0)[seed % 8 if seed % 8 < 4 else 0]
        return claimed.to_bytes(8, "little") + header + content[8 + length :]
    if path.suffix == ".json":
        return changed_text(json.loads(content), seed)
    return changed_bytes(content, seed + 1)


# Servers.

ANSWERS = {
    "scores": {
        "results": [{"index": 0, "relevance_score": 0.5}, {"index": 1, "score": 0.25}],
        "usage": {"prompt_tokens": 5},
    },
    "listed": [{"index": 0, "score": 0.5}, {"index": 1, "score": 0.25}],
    "vector": {"data": [{"embedding": [0.5, 0.5, 0.5]}], "usage": {"prompt_tokens": 5}},
    "bare": [[0.5, 0.5, 0.5]],
    "tokens": {"tokens": [1, 2, 3], "count": 3},
    "error": {"error": {"message": "no", "code": 400}, "detail": [{"msg": "x"}]},
}
PAGES = {
    "/props": {"default_generation_settings": {}, "build_info": "b1", "media_marker": "<m>"},
    "/info": {"model_id": "m", "model_type": {"reranker": {}}, "version": "1"},
    "/version": {"version": "0.22"},
    "/v1/models": {"data": [{"id": "m"}]},
}


class Pages:
    """A client whose server has these pages."""

    url = "http://server"

    def __init__(self, pages):
        self._pages = pages

    def get_json(self, path):
        return self._pages.get(path)

    def has_endpoint(self, path):
        return path in self._pages


@fuzz
@given(SEEDS)
def test_answers_of_servers(seed):
    for value in ANSWERS.values():
        for content in (changed_text(value, seed), changed_bytes(json.dumps(value).encode(), seed)):
            http_client._quoted(http_client._error_text(content.decode("utf-8", "replace")))
            with contextlib.suppress(JsonError):
                found = json_value(content, allow_nan=True)
                tokens_read(found)
                ids_of(found)
                with answered_or_refused():
                    probabilities_as_log_odds("pair", scores_of("pair", found, 2))
                with answered_or_refused():
                    vector_of("item", found)


@fuzz
@given(SEEDS)
def test_pages_of_servers(seed):
    present = {path: page for number, (path, page) in enumerate(PAGES.items()) if seed >> number & 1}
    pages = changed_json(present, seed)
    if isinstance(pages, dict):
        for kind in (None, *ServerKind):
            for task in (None, Task.EMBED):
                with answered_or_refused():
                    server = detect_server(Pages(pages), kind, None, task)
                    json.dumps(asdict(server), default=str)


def test_a_shard_of_a_trillion_is_refused_at_once():
    for text in ("1/1000000000000", "1/" + "9" * 5000, "1/0", "٣/٣", "-1/2"):
        with pytest.raises(UsageError, match="Invalid shard"):
            PanelShard.parse(text)
