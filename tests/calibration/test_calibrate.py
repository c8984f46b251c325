"""`qtool calibrate`: the files that it writes, what it predicts, what it warns about."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors import safe_open

import qtool
from qtool import resources
from qtool.calibration.calibrate import calibration_table
from qtool.calibration.hessian import predict
from qtool.calibration.moments import Moments
from qtool.errors import UsageError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.export.llama_quantize import find_quantizer
from qtool.storage.gguf import read_gguf
from tests.scoring.gguf_files import gguf_of
from tests.upstream import PROGRAMS

RERANKER = "qtool-demo-reranker"
EMBEDDER = "qtool-demo-embedder"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The statistics of the demo reranker on its own set, with Hessians."""
    folder = tmp_path_factory.mktemp("calibrated")
    files = {"output": folder / "stats.gguf", "hessians": folder / "hessians.safetensors"}
    return qtool.calibrate(RERANKER, **files, predict=True, progress=None)


class TestImportanceMatrix:
    def test_the_gguf_package_reads_what_llama_cpp_looks_for(self, made):
        """The keys and names of tools/imatrix: `general.type`, `imatrix.*`, `NAME.in_sum2` and `NAME.counts` in F32."""
        reader = GGUFReader(made.output)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert fields.keys() == {
            "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size", "qtool.calibration",
        }  # fmt: skip
        assert fields["general.type"] == "imatrix"
        assert fields["imatrix.datasets"] == ["demo-calibration"]
        assert fields["imatrix.chunk_count"] == -(-made.data.tokens // 512)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32"}
        names = [f"blk.{layer}.{linear}.weight" for layer in range(4) for linear in LINEARS]
        assert set(tensors) == {f"{name}{end}" for name in names for end in (".in_sum2", ".counts")}
        for name in names:
            width = 512 if "down" in name else 256
            assert tensors[f"{name}.in_sum2"].shape.tolist() == [width, 1]  # ggml's order: columns, matrices
            assert tensors[f"{name}.counts"].shape.tolist() == [1, 1]
            assert tensors[f"{name}.counts"].data.item() == made.data.tokens
            assert (tensors[f"{name}.in_sum2"].data > 0).all()

    def test_names_that_llama_cpp_can_hold(self, made):
        assert max(len(tensor.name) for tensor in GGUFReader(made.output).tensors) < 64 - len("00")

    @pytest.mark.engines
    @pytest.mark.parametrize("type_name", ["q4_k_m", "iq4_xs"])
    def test_llama_quantize_takes_it_and_weighs_by_it(self, made, tmp_path, type_name, monkeypatch):
        if not (PROGRAMS / "llama-quantize").exists():
            pytest.skip("no llama-quantize in .engines/bin: run `make engines`")
        monkeypatch.setenv("PATH", str(PROGRAMS))
        source = gguf_of(resources.demo_model(RERANKER), "f32", tmp_path)
        for name, imatrix in (("plain", None), ("weighed", made.output)):
            find_quantizer().quantize(source, tmp_path / name, type_name, imatrix)
        plain, weighed = (read_gguf(tmp_path / name) for name in ("plain", "weighed"))
        assert weighed.get("quantize.imatrix.entries_count") == 28
        assert weighed.get("quantize.imatrix.dataset") == "demo-calibration"
        assert weighed.get("quantize.imatrix.chunks_count") == -(-made.data.tokens // 512)
        tensor = plain.tensors["blk.0.attn_q.weight"]
        parts = [(tmp_path / n).read_bytes()[f.tensors[tensor.gguf_name].offset :][: tensor.nbytes]
                 for n, f in (("plain", plain), ("weighed", weighed))]  # fmt: skip
        assert parts[0] != parts[1]

    @pytest.mark.engines
    def test_convert_gguf_records_it_in_the_manifest(self, made, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(PROGRAMS))
        options = {"outtypes": ("q4_k_m",), "mmproj": "none", "imatrix": made.output}
        convert_gguf(ConvertOptions(model=RERANKER, output=tmp_path / "out", **options))
        manifest = json.loads((tmp_path / "out" / "qtool.json").read_text())
        assert manifest["calibration"] == json.loads(json.dumps(made.data.to_dict()))
        assert manifest["imatrix"].keys() == {"name", "sha256", "dataset", "entries_count", "chunks_count"}
        assert manifest["imatrix"]["name"] == "stats.gguf"


LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class TestHessians:
    def test_the_safetensors_library_reads_them(self, made):
        with safe_open(made.hessians, "np") as file:
            assert file.metadata() == {"format": "qtool-hessians"}
            modules = {group.module: group for group in made.groups}
            assert set(file.keys()) == {f"{m}.{part}" for m in modules for part in ("hessian", "mean", "tokens")}
            for module, group in modules.items():
                hessian, mean = file.get_tensor(f"{module}.hessian"), file.get_tensor(f"{module}.mean")
                assert hessian.shape == (group.columns, group.columns)
                assert file.get_tensor(f"{module}.tokens").tolist() == [made.data.tokens]
                np.testing.assert_array_equal(hessian, hessian.T)
                np.testing.assert_allclose(hessian.diagonal().mean(), group.mean_square, rtol=1e-5)
            kept = Moments(hessian.astype(float), mean.astype(float), None, None, group.tokens)
            assert predict(kept).gain == pytest.approx(group.gain, rel=1e-3)

    def test_the_prediction_is_above_its_bound_and_below_one(self, made):
        assert all(0 < group.bound < group.gain < 1 and group.gain_centred < 1 for group in made.groups)

    def test_a_failed_run_leaves_no_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr("qtool.calibration.calibrate.predict", lambda _moments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            qtool.calibrate(EMBEDDER, hessians=tmp_path / "h.safetensors", limit=1, progress=None)
        assert list(tmp_path.iterdir()) == []


class TestWarnings:
    def test_the_models_own_set_has_none(self, made):
        assert made.warnings == ()
        assert made.data.tokens > 5 * 512
        assert 0 < made.data.picture_tokens < made.data.tokens
        assert made.headline.startswith("Qwen3VLForConditionalGeneration: ")

    def test_few_tokens_no_picture_and_a_panel_are_said_with_their_numbers(self, tmp_path):
        found = qtool.calibrate(EMBEDDER, data="demo-text", limit=2, output=tmp_path / "s.gguf", progress=None)
        few, missing, shared = found.warnings
        assert few.startswith(f"{found.data.tokens:,} tokens are fewer than 5 times the widest input (512 columns)")
        assert missing.startswith("None of the 28 documents has a picture")
        assert shared.startswith("28 of the documents are in the panel demo-text")
        facts = json.loads(read_gguf(tmp_path / "s.gguf").get("qtool.calibration"))
        assert facts["warnings"] == list(found.warnings)

    def test_no_text_is_said_too(self, tmp_path):
        path = tmp_path / "pictures.jsonl"
        picture = next(resources.path("calibration/general-pictures").glob("chart-*.png"))
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
        path.write_text(json.dumps({"query": "a chart", "documents": [{"image": picture.name}]}))
        found = qtool.calibrate(EMBEDDER, data=[path], output=tmp_path / "s.gguf", progress=None)
        assert any(warning.startswith("All of the 1 documents have a picture") for warning in found.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Missing --output"),
        ({"output": "taken.gguf"}, "already exists"),
        ({"output": "taken.gguf", "force": True}, "was not made by qtool"),
        ({"hessians": "taken.gguf", "force": True}, "was not made by qtool"),
        ({"predict": True, "data": "nothing"}, "Unknown calibration data 'nothing'"),
        ({"predict": True, "dataset": "rows.jsonl"}, "dataset and columns"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_runs(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.gguf").write_bytes(b"GGUF, or not")
    with pytest.raises(UsageError, match=message):
        qtool.calibrate(EMBEDDER, **options, progress=None)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]


def test_a_quantized_checkpoint_is_refused(tmp_path):
    qtool.quantize(EMBEDDER, output=tmp_path / "nvfp4", progress=None)
    with pytest.raises(UsageError, match="is quantized already"):
        qtool.calibrate(tmp_path / "nvfp4", predict=True, progress=None)


def test_force_replaces_what_it_wrote_and_the_result_shows_itself(made, tmp_path, capsys):
    from rich.console import Console

    target = tmp_path / "s.gguf"
    target.write_bytes(made.output.read_bytes())
    again = qtool.calibrate(RERANKER, output=target, limit=1, force=True, progress=None)
    assert target.read_bytes() != made.output.read_bytes()
    assert again.records()[0]["gain"] is None
    Console(width=200).print(calibration_table(made))
    shown = capsys.readouterr().out
    assert "layers.3.mlp.down_proj" in shown
    assert f"--imatrix {made.output}" in shown
    assert made.to_dict()["schema_version"] == 1
