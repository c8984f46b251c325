"""A canary in place of the API key and the Hub's token: whatever a server does with it, it is shown and written nowhere."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from qtool import cli
from qtool.redaction import keep_secret, redacted
from tests import hub
from tests.hostile import CANARY, ECHOES, answer, leaks, serving_raw
from tests.scoring.servers import Reply, results, serving

TOKEN = "hf_CanaryTokenOfNobodyAtAll"
LINE = {"query": "a red ball", "documents": ["a ball", "a cube"]}


@pytest.fixture
def qtool(tmp_path, monkeypatch, capsys):
    """Run a command line in this process; what it printed, with all that lies in the folder afterwards."""
    (tmp_path / "panel.jsonl").write_text(json.dumps(LINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QTOOL_API_KEY", CANARY)
    monkeypatch.setenv("QTOOL_DEBUG", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path.parent / f"{tmp_path.name}-hub"))
    monkeypatch.setattr("qtool.retries.FIRST_PAUSE", 0.01)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qtool", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        written = "".join(path.read_bytes().decode("utf-8", "replace") for path in files)
        return ended.value.code or 0, printed.out + printed.err, written

    yield run
    logging.disable(logging.NOTSET)


def assert_silent(*texts, secret=CANARY):
    for text in texts:
        assert not leaks(text, secret)


COMMANDS = {
    "score": ["--panel", "panel.jsonl", "-o", "scores.jsonl"],
    "embed": ["--panel", "panel.jsonl", "--family", "qwen3", "--engine", "vllm", "-o", "v.npy"],
    "verify": ["--reference", "qtool-demo-reranker", "--panel", "panel.jsonl", "-o", "out"],
}


@pytest.mark.parametrize("mode", ECHOES)
def test_no_command_that_asks_a_server_shows_its_key(mode, qtool):
    is_thorough = mode in ("JSON", "reason", "names")
    with serving_raw(ECHOES[mode]) as url:
        for command in COMMANDS if is_thorough else ["score"]:
            for shown in ("-v", "--json") if is_thorough else ["-v"]:
                code, printed, written = qtool(command, url, *COMMANDS[command], "--timeout", "5", shown)
                assert code in (2, 3, 5), printed
                assert "Traceback" in printed
                assert_silent(printed, written)


def test_a_key_in_all_that_a_good_server_says_is_in_no_report_ledger_or_cache(qtool):
    sent = f"Bearer {CANARY}"

    def reply(path, body):
        if path == "/v1/models":
            return {"data": [{"id": f"model-{CANARY}"}]}
        if path == "/version":
            return {"version": sent}
        if path in ("/rerank", "/classify", "/score"):
            return results(*([0.5] * len(body.get("text_2", [])))) if body else Reply({"error": sent}, 422)
        return None

    with serving(reply) as server:
        command = ["--panel", "panel.jsonl", "--json"]
        code, printed, written = qtool("score", server.url, *command, "-o", "scores.jsonl")
        assert code == 0, printed
        assert "[redacted]" in printed
        assert_silent(printed, written)
        command += ["--reference", "qtool-demo-reranker", "--noise-queries", "0", "--keep-going"]
        code, printed, written = qtool("verify", server.url, *command, "-o", "out")
        assert code in (0, 1, 6), printed
        assert {"report.json", "report.html", "report.md", "junit.xml"} <= {path.name for path in Path("out").iterdir()}
        assert "model-[redacted]" in written
        assert_silent(printed, written)


@pytest.mark.parametrize("mode", ["text", "JSON", "URL", "reason", "redirect", "a header", "no HTTP", "names"])
def test_no_command_that_asks_the_hub_shows_its_token(mode, qtool, monkeypatch):
    with serving_raw(ECHOES[mode]) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        for command in (["inspect", "org/model", "--token", TOKEN], ["doctor"]):
            code, printed, written = qtool(*command, "-v")
            assert code in ((0, 4) if command == ["doctor"] else (3, 5)), printed
            assert_silent(printed, written, secret=TOKEN)


def test_a_token_in_the_files_of_a_repository_is_shown_nowhere(qtool, tmp_path, monkeypatch):
    folder = tmp_path.parent / f"{tmp_path.name}-repository"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": TOKEN, "architectures": [TOKEN]}))
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with hub.serve(folder, token=TOKEN) as site:
        monkeypatch.setattr(constants, "ENDPOINT", site.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for shown in ([], ["-v"], ["--json"]):
            code, printed, _ = qtool("inspect", "org/model", *shown)
            assert code in (0, 1, 3), printed
            assert "[redacted]" in printed
            assert_silent(printed, secret=TOKEN)
        environment = {"HF_ENDPOINT": site.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "QTOOL_DEBUG": "1"}
        command = [sys.executable, "-m", "qtool", "quantize", "org/model", "--dry-run", "-v"]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert_silent(done.stdout + done.stderr, secret=TOKEN)


def test_a_short_key_is_found_as_a_word_and_numbers_stay_numbers():
    for secret in ("s3cret", "12345", "abc"):
        keep_secret(secret)
    assert redacted("Bearer S3CRET, s3crets") == "Bearer [redacted], s3crets"
    assert redacted({"a": 0.12345, "b": ["12345 abc"]}) == {"a": 0.12345, "b": ["12345 abc"]}


def test_a_text_without_secrets_stays_the_same_object():
    value = {"a": ["x" * 99, ("y", 1.5, None)], "b": {"c": "%41 &amp; \\u0041"}}
    assert redacted(value) is value


def test_whoever_logs_a_key_logs_it_redacted(qtool, capsys):
    with serving_raw(lambda *_: iter([answer("{}")])) as url:
        qtool("score", url, "--panel", "panel.jsonl", "-v")
        log = logging.getLogger("somebody")
        log.warning("sent %s", {"Authorization": f"Bearer {CANARY}"})
        failure = ValueError(CANARY)
        log.error("failed\x1b[2J", exc_info=failure)
    said = capsys.readouterr()
    assert_silent(said.out + said.err)
    assert "\x1b" not in said.err
