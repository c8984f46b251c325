"""Weights that were fitted to data are healthy though no rounding to nearest, and whatever is done to them is found."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest

from qtool.checks.stage import Outcome
from qtool.formats.floats import FLOAT_FORMATS
from qtool.formats.nvfp4_checksums import Nvfp4Checksums, Region, band_edges, checksums, compare_checksums
from tests.checks import surgery
from tests.checks.good import calibrate
from tests.checks.stages import compare_weights
from tests.checks.weight_cases import DOWN, FITTED, FITTED_GGUF, LAYER, LAYERS, QUERY, alter
from tests.checks.weight_change_cases import noisy, rounded

BF16 = FLOAT_FORMATS["BF16"]


@pytest.fixture
def artefact(builder, tmp_path):
    """A calibrated artefact that a test may break."""
    return shutil.copytree(builder.good(FITTED), tmp_path / "artefact")


@pytest.fixture
def judged(builder):
    """The stage's outcome and the codes of its findings, and the stage."""

    def judge(artefact, reference=None, name="reranker"):
        stage, _ = compare_weights(artefact, reference or builder.reference(name))
        return stage.outcome, [each.code for each in stage.findings], stage

    return judge


def forget(artefact, *names):
    """Take numbers out of the manifest."""

    def change(manifest):
        for each in manifest["tensors"]:
            for name in names:
                each.pop(name, None)

    surgery.edit(artefact / "qtool.json", change)


@pytest.mark.parametrize(("kind", "name"), [(FITTED, "reranker"), (FITTED_GGUF, "text-reranker")])
def test_a_calibrated_artefact_passes_by_its_records(kind, name, builder, judged):
    outcome, codes, stage = judged(builder.good(kind), name=name)
    assert (outcome, codes) == (Outcome.PASS, [])
    assert "21 of them fitted to data and exactly as qtool.json records" in stage.summary


def test_other_shards_are_the_same_weights(artefact, judged):
    tensors = surgery.read_weights(artefact / "model.safetensors")
    (artefact / "model.safetensors").unlink()
    names = np.array_split(list(tensors), 2)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, part in zip(files, names, strict=True):
        surgery.write_weights(artefact / file, {each: tensors[each] for each in part.tolist()})
    weight_map = {each: file for file, part in zip(files, names, strict=True) for each in part.tolist()}
    (artefact / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert judged(artefact)[:2] == (Outcome.PASS, [])


@pytest.mark.parametrize("names", [("checksums",), ("source_crc32",), ("relative_error", "global_scale")])
def test_without_its_numbers_it_is_judged_by_a_bound_and_says_so(names, artefact, judged):
    forget(artefact, *names)
    outcome, codes, stage = judged(artefact)
    assert (outcome, codes) == (Outcome.PASS, ["fitted-by-bound"])
    assert "and 20 more are fitted to data, and qtool.json has no checksums of them" in stage.findings[0].sentence


@pytest.mark.parametrize(
    "edit",
    [
        lambda each: each.update(relative_error=each["relative_error"] * 1.001),
        lambda each: each.update(source_crc32=each["source_crc32"] ^ 1),
        lambda each: each.update(global_scale=each["global_scale"] * 2),
        lambda each: each.update(checksums=each["checksums"][::-1].lstrip("=") + each["checksums"].count("=") * "="),
    ],
    ids=["error", "source", "scale", "checksums"],
)
def test_an_edited_manifest_condemns_nothing(edit, artefact, judged):
    surgery.edit(
        artefact / "qtool.json", lambda m: edit(next(e for e in m["tensors"] if e["name"] == f"{DOWN}.weight"))
    )
    outcome, codes, stage = judged(artefact)
    assert (outcome, codes) == (Outcome.PASS, ["record-contradicted"])
    assert stage.findings[0].sentence.startswith(f"{DOWN}.weight is fitted to data, and the numbers of qtool.json")


@pytest.mark.parametrize(
    "nonsense",
    [
        {"shape": [128, 64]}, {"shape": None}, {"shape": [-1, 10**30]}, {"checksums": 5}, {"source_crc32": "x"},
        {"global_scale": None}, {"relative_error": "NaN"}, {"name": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_of_nonsense_is_no_record(nonsense, artefact, judged):
    surgery.edit(artefact / "qtool.json", lambda m: [each.update(nonsense) for each in m["tensors"]])
    assert judged(artefact)[:2] == (Outcome.PASS, ["fitted-by-bound"])


def test_without_a_manifest_it_says_what_was_judged(artefact, judged):
    (artefact / "qtool.json").unlink()
    outcome, codes, stage = judged(artefact)
    assert outcome is Outcome.PASS
    assert set(codes) <= {"blocks-otherwise-rounded", "scales-searched"}
    (said,) = [each.sentence for each in stage.findings if each.code == "blocks-otherwise-rounded"]
    assert "only the error of weights, rows and blocks was judged (up to 0." in said


@pytest.mark.parametrize("algorithm", ["mse", "4over6"])
def test_a_search_for_scales_is_healthy_with_a_manifest_and_a_note_without(algorithm, builder, judged, tmp_path):
    artefact = shutil.copytree(builder.good(f"reranker/{algorithm}"), tmp_path / "artefact")
    assert judged(artefact)[:2] == (Outcome.PASS, [])
    (artefact / "qtool.json").unlink()
    assert judged(artefact)[:2] == (Outcome.PASS, ["scales-searched"])


# What is done to it is found, with its records and, where it is large, without.


def shuffle_blocks(data):
    blocks = data.reshape(-1, 8)
    return np.random.default_rng(0).permutation(blocks).reshape(data.shape)


def zero_rows(data):
    data[5:7] = 0
    return data


DAMAGES = {
    "shuffled blocks": (lambda f: alter(f, f"{DOWN}.weight", shuffle_blocks), "weights-differ", "weights-differ"),
    "zeroed rows": (lambda f: alter(f, f"{DOWN}.weight", zero_rows), "blocks-not-recorded", "rows-zero"),
    "swapped nibbles": (
        lambda f: alter(f, f"{DOWN}.weight", lambda d: d >> 4 | d << 4), "nibbles-swapped", "nibbles-swapped",
    ),
    "inverted signs": (lambda f: alter(f, f"{DOWN}.weight", lambda d: d ^ 0x88), "codes-renumbered", "codes-renumbered"),
    "a doubled global scale": (
        lambda f: alter(f, f"{DOWN}.weight_scale_2", lambda d: d * 2), "weights-scaled", "weights-scaled",
    ),
    "a global scale off by half a percent": (
        lambda f: alter(f, f"{DOWN}.weight_scale_2", lambda d: d * np.float32(1.005)), "weights-scaled", None,
    ),
    "q and k exchanged": (
        lambda f: surgery.weights(f, lambda t: surgery.exchange(t, f"{QUERY}.weight", f"{LAYER}self_attn.k_proj.weight")),
        "weights-exchanged", "weights-exchanged",
    ),
    "a layer of another": (
        lambda f: surgery.weights(f, lambda t: surgery.copy(t, f"{LAYERS}1.", f"{LAYERS}2.")),
        "layer-repeated", "layer-repeated",
    ),
    "one code": (lambda f: alter(f, f"{DOWN}.weight", lambda d: one_bit(d, (40, 9), 1)), "blocks-not-recorded", None),
    "one block scale": (
        lambda f: alter(f, f"{DOWN}.weight_scale", lambda d: one_bit(d, (3, 1), 1)), "blocks-not-recorded", None,
    ),
}  # fmt: skip
"""What is done, the code with records, and without (None: too small to be told)."""


def one_bit(data, place, bit):
    data[place] ^= bit
    return data


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("known", [True, False], ids=["recorded", "unrecorded"])
def test_damage_is_found(damage, known, artefact, judged):
    change, recorded, unrecorded = DAMAGES[damage]
    change(artefact)
    if not known:
        forget(artefact, "checksums")
    outcome, codes, _ = judged(artefact)
    expected = recorded if known else unrecorded
    if expected is None:
        assert (outcome, codes) == (Outcome.PASS, ["fitted-by-bound"])
    else:
        assert outcome is Outcome.FAIL
        assert expected in codes


def test_a_damaged_byte_is_located(artefact, judged):
    alter(artefact, f"{DOWN}.weight", lambda data: one_bit(data, (41, 9), 4))
    _, _, stage = judged(artefact)
    (found,) = stage.findings
    assert (
        f"The codes of {DOWN}.weight are not those that qtool.json records, in rows 40-41, columns 16-31:"
        in found.sentence
    )


def test_a_reference_of_another_revision_is_told(artefact, builder, judged, tmp_path):
    reference = shutil.copytree(builder.reference("reranker"), tmp_path / "reference")
    alter(reference, f"{DOWN}.weight", lambda data: rounded(noisy(BF16.widen(data), 0.001)))
    outcome, codes, _ = judged(artefact, reference)
    assert (outcome, codes) == (Outcome.FAIL, ["source-not-recorded"])

    def step(tensors):
        for name, raw in tensors.items():
            if raw.data.ndim > 1:
                tensors[name] = raw.holding(rounded(noisy(BF16.widen(raw.data), 0.005)))

    surgery.weights(reference, step)
    assert "weights-revised" in judged(artefact, reference)[1]


def test_another_calibration_under_this_manifest_is_told(artefact, builder, judged, tmp_path):
    other = calibrate(builder.reference("reranker"), tmp_path / "other", effort="standard")
    assert judged(other)[:2] == (Outcome.PASS, [])
    shutil.copyfile(other / "model.safetensors", artefact / "model.safetensors")
    outcome, codes, stage = judged(artefact)
    assert (outcome, codes) == (Outcome.FAIL, ["weights-not-recorded"])
    assert "and 20 more are near the reference's" in stage.findings[0].sentence


@pytest.mark.parametrize("known", [True, False])
def test_the_weights_of_a_sibling_are_no_calibration(known, builder, judged, tmp_path):
    """Calibrated in the same way from a model that was trained further."""
    sibling = shutil.copytree(builder.reference("reranker"), tmp_path / "sibling")

    def train(tensors):
        for name, raw in tensors.items():
            if raw.data.ndim > 1:
                values = BF16.widen(raw.data)
                step = 0.3 * values.std() * np.random.default_rng(2).normal(size=values.shape)
                tensors[name] = raw.holding(rounded(values + step))

    surgery.weights(sibling, train)
    made = calibrate(sibling, tmp_path / "made")
    if not known:
        (made / "qtool.json").unlink()
    outcome, codes, _ = judged(made)
    assert outcome is Outcome.FAIL
    assert "other-weights" in codes


# Checksums.


@pytest.mark.parametrize("shape", [(1, 16), (31, 48), (64, 512), (100, 528), (257, 1040)])
def test_any_changed_byte_is_in_the_region_that_checksums_give(shape):
    random = np.random.default_rng(1)
    rows, columns = shape
    packed = random.integers(0, 256, (rows, columns // 2), np.uint8)
    scales = random.integers(0, 127, (rows, columns // 16), np.uint8)
    whole = checksums(packed, scales)
    assert compare_checksums(Nvfp4Checksums.decoded(whole.encoded(), shape), whole, shape) is None
    for _ in range(20):
        row, column, is_code = random.integers(rows), random.integers(columns // 16), random.random() < 0.5
        part, place = (packed, (row, 8 * column + 3)) if is_code else (scales, (row, column))
        part[place] ^= 1
        found = compare_checksums(checksums(packed, scales), whole, shape)
        part[place] ^= 1
        assert (found.codes, found.block_scales) == (is_code, not is_code)
        assert found.region.rows[0] <= row < found.region.rows[1]
        assert found.region.columns[0] <= 16 * column < found.region.columns[1]
        assert found.region.rows[1] - found.region.rows[0] <= -(-rows // 32)


def test_a_text_that_is_no_checksums_is_none():
    good = checksums(np.zeros((40, 8), np.uint8), np.zeros((40, 1), np.uint8))
    for text in ("", "abc", "====", good.encoded()[4:], "é" * 700):
        assert Nvfp4Checksums.decoded(text, (40, 16)) is None
    assert Nvfp4Checksums.decoded(good.encoded(), (41, 16)) is not None  # as many bands
    assert Nvfp4Checksums.decoded(good.encoded(), (20, 16)) is None


def test_bands_cover_all_rows():
    for count in (0, 1, 31, 32, 33, 1000):
        edges = band_edges(count)
        assert (edges[0], edges[-1], len(edges)) == (0, count, min(max(count, 1), 32) + 1)
        assert all(first <= last for first, last in pairwise(edges))
    assert str(Region((2, 4), (0, 16))) == "rows 2-3, columns 0-15"
