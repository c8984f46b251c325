"""What no command foresees ends with the code of its kind, and never with the 1 of a verdict."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qtool import cli
from tests.scoring import tiny


def _torchs(message):
    return type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})(message)


def ended(monkeypatch, error):
    """The exit code of a command line that raises `error` somewhere."""

    def app():
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/full/x"), 4, "The system refused: /full/x: No space left on device."),
        (OSError("no model\nthere"), 4, "The system refused: no model there"),
        (MemoryError(), 4, "There is not enough memory."),
        (_torchs("CUDA out of memory."), 4, "There is not enough GPU memory: CUDA out of memory."),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 4, "The package torch is not installed."),
        (ImportError("x requires\ny."), 4, "A package cannot be imported: x requires y."),
        (ModuleNotFoundError("No module named 'qtool.x'", name="qtool.x"), 70, "No module named 'qtool.x'"),
        (ValueError("a\nb"), 70, "qtool itself failed: ValueError: a b"),
        (KeyError("x"), 70, "qtool itself failed: KeyError: 'x'"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), 70, "UnicodeEncodeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_crash_is_no_verdict(error, code, message, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert ended(monkeypatch, error) == code
    said = capsys.readouterr()
    assert message in said.err.splitlines()[0]
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_crash_tells_how_to_see_its_traceback(monkeypatch, capsys):
    assert ended(monkeypatch, ValueError("x" * 9999)) == 70
    first, second = capsys.readouterr().err.splitlines()
    assert len(first) < 400
    assert "Set QTOOL_DEBUG=1 for the traceback." in second
    monkeypatch.setenv("QTOOL_DEBUG", "1")
    assert ended(monkeypatch, ValueError("here")) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "ValueError: here" in said


def test_nothing_that_a_command_raises_ends_with_the_1_of_a_verdict():
    script = "import sys; from qtool import cli\n"
    script += "class PanicException(BaseException): pass\n"  # as Rust's reach Python
    script += "def stop(): raise {}\n"
    script += "cli.app.command('stop')(stop); sys.argv = ['qtool', 'stop']; cli.main()"
    for error, code in (("EOFError('torn')", 70), ("BrokenPipeError(32, 'Broken')", 4), ("PanicException('torn')", 70)):
        done = subprocess.run([sys.executable, "-c", script.format(error)], check=False, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "show", ["line('x' * 99999)", "line('x')", "json({})", "lines(['x'])", "result('x')", "status('x')"]
)
def test_a_reader_who_left_changes_no_exit_code(show):
    script = "import sys, typer; from qtool import cli, console\n"
    script += f"def end():\n console.show_{show}\n console.show_{show}\n raise typer.Exit(7)\n"
    script += "cli.app.command('end')(end); sys.argv = ['qtool', 'end']; sys.stdin.read(); cli.main()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as left:
        (left.stderr if "status" in show else left.stdout).close()
        left.stdin.close()
        assert (left.stdout if "status" in show else left.stderr).read() == b""
    assert left.returncode == 7


def test_an_interruption_is_130_and_a_reader_who_left_is_not_told():
    script = "import sys; from qtool import cli\n"
    script += "def stop(): raise KeyboardInterrupt\n"
    script += "cli.app.command('stop')(stop); sys.argv = ['qtool', 'stop']; cli.main()"
    stopped = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "Interrupted.\n")
    with subprocess.Popen(
        [sys.executable, "-m", "qtool", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as left:
        left.stdout.close()
        assert left.stderr.read() == b""


def test_what_decides_nothing_is_6_and_with_strict_1(tmp_path, monkeypatch, capsys):
    model = str(tiny.write_text(tmp_path / "model"))
    command = ["qtool", "-q", "verify", model, "--reference", model, "--task", "rerank", "--panel", "demo-text"]
    for strict, code in (([], 6), (["--strict"], 1)):
        monkeypatch.setattr(sys, "argv", [*command, "--limit", "2", *strict])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == code
        assert "INCONCLUSIVE" in capsys.readouterr().out.upper()
