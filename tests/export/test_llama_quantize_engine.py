"""llama.cpp itself quantizes: the program and the library that `make engines` compiles."""

from __future__ import annotations

import numpy as np
import pytest

from qtool import resources
from qtool.errors import SetupError, UsageError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import LLAMA_QUANTIZE_TYPES, ConvertOptions
from qtool.export.llama_quantize import find_quantizer
from qtool.export.tensor_types import parse_tensor_types
from qtool.inputs.panels import load_panel
from qtool.scoring.llama_cpp.runtime import open_llama_cpp
from qtool.storage.gguf import read_gguf
from tests.export.zeros import write_imatrix
from tests.scoring.gguf_files import gguf_of
from tests.upstream import PACKAGES, PROGRAMS

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
            with pytest.raises(UsageError, match="matrices without data: 27"):
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

    def test_single_matrices_get_the_type_that_is_asked(
        self, reranker, tmp_path, program_by_engines, library_by_engines, pairs
    ):
        types = parse_tensor_types([r"blk\.0\.attn_v=f16", "attn_v=q8_0", r"^blk\.1\.ffn_down\.weight$=q3_k"])
        for name, quantizer in (("program", program_by_engines), ("library", library_by_engines)):
            quantizer.quantize(reranker, tmp_path / name, "q4_k_m", tensor_types=types)
        assert (tmp_path / "program").read_bytes() == (tmp_path / "library").read_bytes()
        made = read_gguf(tmp_path / "program").tensors
        wanted = {"blk.0.attn_v": "F16", "blk.1.attn_v": "Q8_0", "blk.1.ffn_down": "Q3_K", "blk.1.attn_q": "Q4_K"}
        assert {name: made[f"{name}.weight"].type.name for name in wanted} == wanted
        assert len(probabilities(tmp_path / "program", pairs)) == len(pairs)

    @pytest.mark.usefixtures("program_by_engines")
    def test_a_conversion_counts_what_llama_cpp_does_as_well(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(PROGRAMS))
        steps = []
        model = str(resources.demo_model("qtool-demo-reranker"))
        options = ConvertOptions(model=model, output=tmp_path / "out", outtypes=("q4_k_m", "q6_k"), mmproj="none")
        convert_gguf(options, lambda *step: steps.append(step))
        done, totals = zip(*steps, strict=True)
        assert list(done) == sorted(done)
        assert set(totals) == {done[-1]}
        assert len(steps) > 2 * len(read_gguf(next((tmp_path / "out").glob("*Q6_K.gguf"))).tensors)


def probabilities(path, pairs):
    with open_llama_cpp(path) as scorer:
        return 1 / (1 + np.exp(-np.array(scorer.score(pairs))))
