"""K- and I-quants: which quantizer is taken, what is asked of it, what its file is checked for; and llama.cpp itself."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from qtool import resources
from qtool.convert import libllama, llama_quantize
from qtool.convert.llama_quantize import Quantizer, find_quantizer, quantize_file
from qtool.convert.types import LLAMA_QUANTIZE_TYPES
from qtool.errors import EXIT_SETUP, ModelError, SetupError, UsageError
from qtool.gguf_file.reader import read_gguf
from qtool.inputs.panels import load_panel
from qtool.scoring.llama_cpp import open_llama_cpp
from tests.scoring.gguf_files import gguf_of
from tests.upstream import PACKAGES, PROGRAMS

SOURCE = {
    "cls.output.weight": ((2, 256), Type.F16),
    "token_embd.weight": ((64, 256), Type.F16),
    "output_norm.weight": ((256,), Type.F32),
    "blk.0.attn_q.weight": ((256, 256), Type.F16),
}
MADE = {**SOURCE, "token_embd.weight": ((64, 256), Type.Q8_0), "blk.0.attn_q.weight": ((256, 256), Type.Q4_K)}


def write_gguf(path, tensors, *, file_type=1, labels=("yes", "no"), pooling=4):
    """A file whose tensors are zeros."""
    writer = GGUFWriter(path, "qwen3")
    writer.add_file_type(file_type)
    writer.add_uint32("qwen3.pooling_type", pooling)
    if labels:
        writer.add_array("qwen3.classifier.output_labels", list(labels))
    writer.add_string("tokenizer.chat_template.rerank", "{query} {document}")
    for name, (shape, kind) in tensors.items():
        writer.add_tensor(name, np.zeros(quant_shape_to_byte_shape(shape, kind), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_imatrix(path, matrices, *, counts=True, chunks=3):
    """An importance matrix; `matrices` says for each name the width and how often it was seen."""
    writer = GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    random = np.random.default_rng(0)
    for name, (width, count) in matrices.items():
        writer.add_tensor(f"{name}.in_sum2", random.random((1, width), np.float32))
        if counts:
            writer.add_tensor(f"{name}.counts", np.full((1, 1), count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
        assert find_quantizer().command == (sys.executable, "-m", "qtool.convert.libllama")

    @pytest.mark.usefixtures("path", "no_library")
    def test_neither_ends_with_exit_code_4_and_the_install_line(self, source, tmp_path):
        with pytest.raises(SetupError) as error:
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m")
        assert error.value.exit_code == EXIT_SETUP
        assert "neither llama-quantize (on PATH) nor llama-cpp-python is here" in error.value.message
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
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m")
        assert "pip install" in error.value.message


class TestAsking:
    def test_head_and_embedding_are_protected(self, source, tmp_path, program):
        program(f"open({str(tmp_path / 'asked')!r}, 'w').write(repr(sys.argv[1:]))\nsys.exit(1)")
        with pytest.raises(SetupError):
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m")
        assert (tmp_path / "asked").read_text() == repr(
            ["--token-embedding-type", "q8_0", "--tensor-type", r"cls\.output=f16",
             str(source), str(tmp_path / "out.gguf"), "Q4_K_M"]
        )  # fmt: skip

    def test_the_imatrix_is_named_without_its_folder(self, source, tmp_path, program):
        """llama.cpp writes the path into the file that gets published."""
        matrix = tmp_path / "private" / "matrix.gguf"
        matrix.parent.mkdir()
        matrix.touch()
        program(f"open({str(tmp_path / 'asked')!r}, 'w').write(os.getcwd() + repr(sys.argv[5:7]))\nsys.exit(1)")
        with pytest.raises(SetupError):
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m", matrix)
        assert (tmp_path / "asked").read_text() == f"{matrix.parent}['--imatrix', 'matrix.gguf']"

    def test_a_missing_imatrix(self, source, tmp_path, program):
        program()
        with pytest.raises(UsageError, match="no such file"):
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m", tmp_path / "none.gguf")

    def test_an_imatrix_of_another_model(self, source, tmp_path, program):
        made = write_gguf(tmp_path / "made", MADE, file_type=15)
        said = r"print('\n====== llama_model_quantize_impl: did not find weights for blk.0.attn_q.weight')"
        program(f"{said}\n{copying(made)}")
        with pytest.raises(UsageError, match=r"knows nothing of 1 matrices, blk\.0\.attn_q\.weight among them"):
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m", made)
        assert not (tmp_path / "out.gguf").exists()

    def test_what_is_quantized_already_is_refused(self, tmp_path, program):
        program()
        packed = write_gguf(tmp_path / "packed.gguf", MADE)
        with pytest.raises(ModelError, match=r"token_embd.weight \[64, 256\] is Q8_0; iq4_xs is made from F32, F16"):
            quantize_file(packed, tmp_path / "out.gguf", "iq4_xs")

    def test_a_width_that_does_not_divide_is_refused(self, tmp_path, program):
        """llama.cpp would take Q5_0 for this tensor, and say so in a line that nobody reads."""
        program()
        odd = write_gguf(tmp_path / "odd.gguf", {**SOURCE, "blk.0.ffn_up.weight": ((256, 96), Type.F32)})
        with pytest.raises(ModelError, match=r"blk.0.ffn_up.weight \[256, 96\]: q4_k_m packs 256 values"):
            quantize_file(odd, tmp_path / "out.gguf", "q4_k_m")


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
        with pytest.raises(SetupError, match="did not do as asked") as error:
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m")
        assert fault in error.value.message
        assert not (tmp_path / "out.gguf").exists()

    def test_a_failure_tells_the_last_lines(self, source, tmp_path, program):
        program("open(target, 'w'); [print('line', n) for n in range(99)]; sys.exit('unknown model architecture')")
        with pytest.raises(SetupError, match="failed with exit status 1") as error:
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m")
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
        with pytest.raises(SetupError, match="failed with exit status -6:\nIt said nothing"):
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m")

    def test_no_file(self, source, tmp_path, program):
        program()
        with pytest.raises(SetupError, match="left no complete file"):
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m")

    def test_half_a_file(self, source, tmp_path, program):
        """On a full disk llama.cpp succeeds."""
        made = write_gguf(tmp_path / "made", MADE, file_type=15)
        program(f"{copying(made)}\nos.truncate(target, os.path.getsize(target) // 2)")
        with pytest.raises(SetupError, match="left no complete file") as error:
            quantize_file(source, tmp_path / "out.gguf", "q4_k_m")
        assert "disk full" in error.value.hint
        assert not (tmp_path / "out.gguf").exists()


class TestImportanceMatrices:
    def test_means_over_what_was_seen(self, tmp_path):
        path = write_imatrix(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (4, 2), "blk.1.attn_q.weight": (4, 0)})
        sums = np.random.default_rng(0).random((1, 4), np.float32)
        matrix = libllama.read_imatrix(path)
        np.testing.assert_array_equal(matrix.columns["blk.0.attn_q.weight"], sums[0] / np.float32(2))
        np.testing.assert_array_equal(matrix.columns["blk.1.attn_q.weight"], np.ones(4, np.float32))
        assert list(matrix.origin.items()) == [
            ("quantize.imatrix.file", str(path)),
            ("quantize.imatrix.dataset", "calibration.txt"),
            ("quantize.imatrix.entries_count", 2),
            ("quantize.imatrix.chunks_count", 3),
        ]

    def test_the_old_format_is_left_to_the_program(self, tmp_path):
        (tmp_path / "m.dat").write_bytes(bytes(64))
        with pytest.raises(ModelError) as error:
            libllama.read_imatrix(tmp_path / "m.dat")
        assert "needs the program llama-quantize" in error.value.hint

    def test_a_model_is_none(self, source):
        with pytest.raises(ModelError, match="is no importance matrix"):
            libllama.read_imatrix(source)

    def test_sums_without_counts(self, tmp_path):
        path = write_imatrix(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (4, 2)}, counts=False)
        with pytest.raises(ModelError, match=r"lacks its \.in_sum2 or \.counts"):
            libllama.read_imatrix(path)


MATRICES = {
    "q6_k": {"Q6_K"},
    "q5_k_m": {"Q5_K", "Q6_K"},
    "q4_k_m": {"Q4_K", "Q6_K"},
    "iq4_xs": {"IQ4_XS"},
}
"""What the decoder's matrices become; the `_m` types give every third V and down projection more bits."""

BOUNDS = {"q6_k": 0.012, "q5_k_m": 0.015, "q4_k_m": 0.025, "iq4_xs": 0.035}
"""The largest |ΔP| against the F32 file, measured over all 1,680 pairs of the panel (0.0113, 0.0136, 0.0221, 0.0310)."""

QUERIES = 6
"""How many of the panel's 120 queries the tests ask."""


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The F32 files of the demo models, by name."""
    folder = tmp_path_factory.mktemp("made")
    return {name: gguf_of(resources.demo_model(name), "f32", folder) for name in resources.demo_models()}


@pytest.fixture
def reranker(made):
    return made["qtool-demo-reranker"]


@pytest.fixture(scope="session")
def pairs():
    queries = load_panel(resources.path("calibration/panels/demo-text.jsonl")).queries[:QUERIES]
    return [pair for query in queries for pair in query.pairs]


@pytest.fixture(scope="session")
def lossless(made, pairs):
    return probabilities(made["qtool-demo-reranker"], pairs)


@pytest.fixture(scope="session")
def program_by_engines():
    if not (PROGRAMS / "llama-quantize").exists():
        pytest.skip("no llama-quantize in .engines/bin: run `make engines`")
    return find_quantizer_in(str(PROGRAMS))


def find_quantizer_in(search_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", search_path)
        return find_quantizer()


@pytest.fixture
def library_by_engines(monkeypatch, tmp_path, program_by_engines):  # noqa: ARG001 - they are made together
    """llama-cpp-python's package over the library that the program was linked with."""
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(PROGRAMS))
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    monkeypatch.syspath_prepend(PACKAGES)
    return find_quantizer_in(str(tmp_path))


def matrix_for(source, path):
    shapes = {t.gguf_name: t.shape for t in read_gguf(source).tensors.values() if len(t.shape) == 2}
    return write_imatrix(path, {name: (shape[1], 7) for name, shape in shapes.items() if name.startswith("blk.")})


def tensor_bytes(path, name):
    tensor = read_gguf(path).tensors[name]
    return path.read_bytes()[tensor.offset :][: tensor.nbytes]


@pytest.mark.engines
class TestLlamaCpp:
    @pytest.mark.parametrize("type_name", LLAMA_QUANTIZE_TYPES)
    def test_a_reranker(self, reranker, tmp_path, program_by_engines, type_name):
        program_by_engines.quantize(reranker, tmp_path / "out.gguf", type_name)
        before, after = read_gguf(reranker), read_gguf(tmp_path / "out.gguf")
        assert after.get("general.file_type") == LLAMA_QUANTIZE_TYPES[type_name]
        kept = {key: value for key, value in before.metadata.items() if key != "general.file_type"}
        assert {key: value for key, value in after.metadata.items() if key != "general.file_type"} == kept
        assert after.get("qwen3vl.classifier.output_labels") == ["yes", "no"]
        assert tensor_bytes(tmp_path / "out.gguf", "cls.output.weight") == tensor_bytes(reranker, "cls.output.weight")
        assert after.tensors["token_embd.weight"].type.name == "Q8_0"
        blocks = [t for t in after.tensors.values() if t.gguf_name.startswith("blk.") and len(t.shape) == 2]
        assert {tensor.type.name for tensor in blocks} == MATRICES[type_name]

    @pytest.mark.parametrize("type_name", LLAMA_QUANTIZE_TYPES)
    def test_scores(self, reranker, tmp_path, program_by_engines, type_name, pairs, lossless):
        program_by_engines.quantize(reranker, tmp_path / "out.gguf", type_name)
        distance = np.abs(probabilities(tmp_path / "out.gguf", pairs) - lossless).max()
        assert 0 < distance < BOUNDS[type_name]

    @pytest.mark.parametrize("type_name", LLAMA_QUANTIZE_TYPES)
    @pytest.mark.parametrize("guided", [False, True])
    def test_the_library_writes_the_same_bytes(
        self, reranker, tmp_path, program_by_engines, library_by_engines, type_name, guided, capfd
    ):
        matrix = matrix_for(reranker, tmp_path / "matrix.gguf") if guided else None
        for name, quantizer in (("program", program_by_engines), ("library", library_by_engines)):
            quantizer.quantize(reranker, tmp_path / name, type_name, matrix)
        assert (tmp_path / "program").read_bytes() == (tmp_path / "library").read_bytes()
        assert capfd.readouterr() == ("", "")

    def test_an_imatrix_guides(self, reranker, tmp_path, program_by_engines):
        matrix = matrix_for(reranker, tmp_path / "matrix.gguf")
        for name, each in (("plain", None), ("guided", matrix)):
            program_by_engines.quantize(reranker, tmp_path / name, "iq4_xs", each)
        plain, guided = (tensor_bytes(tmp_path / name, "blk.0.attn_q.weight") for name in ("plain", "guided"))
        assert plain != guided
        assert read_gguf(tmp_path / "guided").get("quantize.imatrix.file") == "matrix.gguf"

    def test_an_imatrix_of_another_model(self, reranker, tmp_path, program_by_engines, library_by_engines):
        matrix = write_imatrix(tmp_path / "matrix.gguf", {"blk.0.attn_q.weight": (256, 7)})
        for quantizer in (program_by_engines, library_by_engines):
            with pytest.raises(UsageError, match="knows nothing of 27 matrices"):
                quantizer.quantize(reranker, tmp_path / "out.gguf", "q4_k_m", matrix)

    def test_a_broken_imatrix(self, reranker, tmp_path, program_by_engines, library_by_engines):
        (tmp_path / "matrix.dat").write_bytes(bytes(64))
        for quantizer in (program_by_engines, library_by_engines):
            with pytest.raises(SetupError, match="failed with exit status"):
                quantizer.quantize(reranker, tmp_path / "out.gguf", "q4_k_m", tmp_path / "matrix.dat")

    def test_an_embedder(self, made, tmp_path, program_by_engines, library_by_engines):
        for quantizer in (program_by_engines, library_by_engines):
            quantizer.quantize(made["qtool-demo-embedder"], tmp_path / "out.gguf", "q5_k_m")
            assert "cls.output.weight" not in read_gguf(tmp_path / "out.gguf").tensors

    def test_progress_counts_tensors(self, reranker, tmp_path, program_by_engines):
        steps = []
        program_by_engines.quantize(reranker, tmp_path / "out.gguf", "q6_k", progress=lambda *step: steps.append(step))
        total = len(read_gguf(reranker).tensors)
        assert steps == [(number, total) for number in range(1, total + 1)]


def probabilities(path, pairs):
    with open_llama_cpp(path) as scorer:
        return 1 / (1 + np.exp(-np.array(scorer.score(pairs))))
