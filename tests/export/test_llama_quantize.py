"""K- and I-quants: which quantizer is taken, what is asked of it, what its file is checked for."""

from __future__ import annotations

import os
import sys
from typing import ClassVar

import pytest
from gguf import GGMLQuantizationType as Type

from qtool.errors import EXIT_SETUP, ModelError, SetupError, UsageError
from qtool.export import llama_quantize
from qtool.export.llama_quantize import Quantizer, find_quantizer
from qtool.export.tensor_types import check_tensor_types, parse_tensor_types
from tests.export.zeros import SOURCE, write_gguf

MADE = {**SOURCE, "token_embd.weight": ((64, 256), Type.Q8_0), "blk.0.attn_q.weight": ((256, 256), Type.Q4_K)}


@pytest.fixture
def source(tmp_path):
    return write_gguf(tmp_path / "source.gguf", SOURCE)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """An empty folder that is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(llama_quantize, "find_spec", lambda _name: None)


@pytest.fixture
def program(path):
    """Puts a program `llama-quantize` that runs `code` on PATH."""

    def install(code=""):
        file = path / "llama-quantize"
        file.write_text(f"#!{sys.executable}\nimport os, shutil, sys\n*_, source, target, kind = sys.argv\n{code}\n")
        file.chmod(0o755)
        return file

    return install


def copying(made):
    return f"shutil.copyfile({str(made)!r}, target)"


class TestFinding:
    def test_the_program_comes_first(self, program, monkeypatch):
        monkeypatch.setattr(llama_quantize, "find_spec", lambda _name: "here as well")
        file = program()
        assert find_quantizer() == Quantizer(str(file), (str(file),))

    @pytest.mark.usefixtures("path")
    def test_then_the_library(self, tmp_path, monkeypatch):
        (tmp_path / "llama_cpp").mkdir()
        (tmp_path / "llama_cpp" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        assert find_quantizer().command == (sys.executable, "-m", "qtool.export.libllama")

    @pytest.mark.usefixtures("path", "no_library")
    def test_neither_ends_with_exit_code_4_and_the_install_line(self, source, tmp_path):
        with pytest.raises(SetupError) as error:
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m")
        assert error.value.exit_code == EXIT_SETUP
        assert "found neither llama-quantize on PATH nor the package llama-cpp-python" in error.value.message
        assert "q6_k, q5_k_m, q4_k_m, iq4_xs" in error.value.message
        assert "pip install 'llama-cpp-python>=0.3.36'" in error.value.hint
        assert not (tmp_path / "out.gguf").exists()

    def test_an_old_library_is_said_to_be_old(self, source, tmp_path, path, monkeypatch):  # noqa: ARG002
        (tmp_path / "llama_cpp").mkdir()
        (tmp_path / "llama_cpp" / "__init__.py").touch()
        (tmp_path / "llama_cpp" / "llama_cpp.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        with pytest.raises(SetupError, match="cannot keep single tensors unquantized") as error:
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m")
        assert "pip install" in error.value.message


class TestAsking:
    def test_head_and_embedding_are_protected(self, source, tmp_path, program):
        program(f"open({str(tmp_path / 'asked')!r}, 'w').write(repr(sys.argv[1:]))\nsys.exit(1)")
        with pytest.raises(SetupError):
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m")
        assert (tmp_path / "asked").read_text() == repr(
            ["--token-embedding-type", "q8_0", "--tensor-type", r"cls\.output=f16",
             str(source), str(tmp_path / "out.gguf"), "Q4_K_M"]
        )  # fmt: skip

    def test_types_of_single_matrices_follow_that_of_the_head(self, source, tmp_path, program):
        """llama.cpp takes the first pattern that matches: none may reach the rank head."""
        program(f"open({str(tmp_path / 'asked')!r}, 'w').write(repr(sys.argv[3:7]))\nsys.exit(1)")
        types = parse_tensor_types(["blk.*=Q6_K"])
        with pytest.raises(SetupError):
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m", tensor_types=types)
        assert (tmp_path / "asked").read_text() == repr(
            ["--tensor-type", r"cls\.output=f16", "--tensor-type", "blk.*=q6_k"]
        )

    def test_the_imatrix_is_named_without_its_folder(self, source, tmp_path, program):
        """llama.cpp writes the path into the file that gets published."""
        matrix = tmp_path / "private" / "matrix.gguf"
        matrix.parent.mkdir()
        matrix.touch()
        program(f"open({str(tmp_path / 'asked')!r}, 'w').write(os.getcwd() + repr(sys.argv[5:7]))\nsys.exit(1)")
        with pytest.raises(SetupError):
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m", matrix)
        assert (tmp_path / "asked").read_text() == f"{matrix.parent}['--imatrix', 'matrix.gguf']"

    def test_a_missing_imatrix(self, source, tmp_path, program):
        program()
        with pytest.raises(UsageError, match="No such file"):
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m", tmp_path / "none.gguf")

    def test_an_imatrix_of_another_model(self, source, tmp_path, program):
        made = write_gguf(tmp_path / "made", MADE, file_type=15)
        said = r"print('\n====== llama_model_quantize_impl: did not find weights for blk.0.attn_q.weight')"
        program(f"{said}\n{copying(made)}")
        with pytest.raises(UsageError, match=r"has no data for blk\.0\.attn_q\.weight \(matrices without data: 1\)"):
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m", made)
        assert not (tmp_path / "out.gguf").exists()

    def test_what_is_quantized_already_is_refused(self, tmp_path, program):
        program()
        packed = write_gguf(tmp_path / "packed.gguf", MADE)
        with pytest.raises(ModelError, match=r"token_embd.weight \[64, 256\] is Q8_0; iq4_xs needs F32, F16"):
            find_quantizer().quantize(packed, tmp_path / "out.gguf", "iq4_xs")

    def test_a_width_that_does_not_divide_is_refused(self, tmp_path, program):
        """llama.cpp would take Q5_0 for this tensor, and say so in a line that nobody reads."""
        program()
        odd = write_gguf(tmp_path / "odd.gguf", {**SOURCE, "blk.0.ffn_up.weight": ((256, 96), Type.F32)})
        with pytest.raises(
            ModelError, match=r"blk.0.ffn_up.weight \[256, 96\]: The row length is not a multiple of 256"
        ):
            find_quantizer().quantize(odd, tmp_path / "out.gguf", "q4_k_m")


class TestChecking:
    def test_a_file_as_asked(self, source, tmp_path, program, capfd):
        made = write_gguf(tmp_path / "made", MADE, file_type=15)
        counted = r"print('[   1/   4] blk.0', end=' ', flush=True); print('done'); print('chatter', file=sys.stderr)"
        program(f"{counted}\n{copying(made)}")
        steps = []
        find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m", progress=lambda *step: steps.append(step))
        assert (tmp_path / "out.gguf").read_bytes() == made.read_bytes()
        assert steps == [(1, 4)]
        assert capfd.readouterr() == ("", "")

    def test_a_matrix_of_another_type_than_asked(self, source, tmp_path, program):
        program(copying(write_gguf(tmp_path / "made", MADE, file_type=15)))
        with pytest.raises(SetupError, match=r"blk\.0\.attn_q\.weight is Q4_K, not Q6_K"):
            find_quantizer().quantize(
                source, tmp_path / "out.gguf", "q4_k_m", tensor_types=parse_tensor_types(["attn_q=q6_k"])
            )

    @pytest.mark.parametrize(
        ("tensors", "metadata", "fault"),
        [
            ({"cls.output.weight": ((2, 256), Type.Q4_K)}, {}, "cls.output.weight is Q4_K, not F16"),
            ({"token_embd.weight": ((64, 256), Type.Q6_K)}, {}, "token_embd.weight is Q6_K, not Q8_0"),
            ({"output_norm.weight": ((256,), Type.F16)}, {}, "output_norm.weight is F16, not F32"),
            ({"blk.0.attn_k.weight": ((256, 256), Type.Q4_K)}, {}, "the tensors are not those of the source"),
            ({}, {"file_type": 1}, "the file type is 1, not q4_k_m"),
            ({}, {"labels": None}, "the metadata qwen3.classifier.output_labels is lost"),
            ({}, {"pooling": 3}, "the metadata qwen3.pooling_type is changed"),
        ],
    )
    def test_a_file_not_as_asked(self, source, tmp_path, program, tensors, metadata, fault):
        made = write_gguf(tmp_path / "made", {**MADE, **tensors}, **{"file_type": 15, **metadata})
        program(copying(made))
        with pytest.raises(SetupError, match="wrote another file than requested") as error:
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m")
        assert fault in error.value.message
        assert not (tmp_path / "out.gguf").exists()

    def test_a_failure_tells_the_last_lines(self, source, tmp_path, program):
        program("open(target, 'w'); [print('line', n) for n in range(99)]; sys.exit('unknown model architecture')")
        with pytest.raises(SetupError, match="failed with exit status 1") as error:
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m")
        assert "unknown model architecture" in error.value.message
        assert "line 98" in error.value.message
        assert "line 80" not in error.value.message
        assert not (tmp_path / "out.gguf").exists()

    def test_ctrl_c_ends_it(self, source, tmp_path, program):
        """The process that it leaves would write on for minutes."""
        pid = tmp_path / "pid"
        program(f"open({str(pid)!r}, 'w').write(str(os.getpid())); open(target, 'w')\n"
                "import time; print('[1/2]', flush=True); time.sleep(60)")  # fmt: skip

        def interrupted(_done, _total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m", progress=interrupted)
        assert not (tmp_path / "out.gguf").exists()
        with pytest.raises(ChildProcessError):  # ended, and its end taken note of
            os.waitpid(int(pid.read_text()), os.WNOHANG)

    def test_an_abort(self, source, tmp_path, program):
        program("os.abort()")
        with pytest.raises(SetupError, match="failed with exit status -6:\nIt printed nothing"):
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m")

    def test_no_file(self, source, tmp_path, program):
        program()
        with pytest.raises(SetupError, match="wrote an incomplete file"):
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m")

    def test_half_a_file(self, source, tmp_path, program):
        """On a full disk llama.cpp succeeds."""
        made = write_gguf(tmp_path / "made", MADE, file_type=15)
        program(f"{copying(made)}\nos.truncate(target, os.path.getsize(target) // 2)")
        with pytest.raises(SetupError, match="wrote an incomplete file") as error:
            find_quantizer().quantize(source, tmp_path / "out.gguf", "q4_k_m")
        assert "disk is not full" in error.value.hint
        assert not (tmp_path / "out.gguf").exists()


class TestTensorTypes:
    SHAPES: ClassVar = {
        "blk.0.attn_q.weight": (256, 256),
        "blk.0.ffn_up.weight": (256, 96),
        "blk.10.attn_q.weight": (256, 256),
    }

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["attn_q"], "Invalid --tensor-type 'attn_q': expected PATTERN=TYPE"),
            (["=q6_k"], "expected PATTERN=TYPE"),
            (["attn_q=q9"], "Unknown type 'q9'"),
            (["attn_q=nvfp4"], "Unknown type 'nvfp4'"),
            (["[=q6_k"], "Invalid pattern"),
            (["attn_x=q6_k"], "matches no matrix that is quantized"),
            (["cls=q6_k"], "matches no matrix that is quantized"),
            (["attn=q6_k", "attn_q=q5_k"], "has no effect: earlier patterns match"),
            (["ffn_up=q6_k"], "has 96 columns, no multiple of 256"),
        ],
    )
    def test_what_llama_cpp_would_ignore_or_change_is_refused(self, words, message):
        with pytest.raises(UsageError, match=message):
            check_tensor_types(parse_tensor_types(words), self.SHAPES)

    def test_a_file_comes_after_the_command_line_which_may_override_it(self, tmp_path):
        (tmp_path / "types.txt").write_text("^blk\\.0\\.attn_q\\.weight$=q5_k\nblk=q8_0\n")
        types = parse_tensor_types(["attn_q=f16"], tmp_path / "types.txt")
        check_tensor_types(types, self.SHAPES)
        assert next(each.argument for each in types) == "attn_q=f16"
        with pytest.raises(UsageError, match="cannot be read"):
            parse_tensor_types([], tmp_path / "none.txt")
