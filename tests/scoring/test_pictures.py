from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qtool.inputs.items import Item
from qtool.scoring import prompt as pictures
from qtool.scoring.prompt import PictureCache


def test_pictures_are_kept_up_to_a_bound_the_least_recently_used_dropped_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load = pictures.load_image
    monkeypatch.setattr(pictures, "load_image", lambda source: read.append(Path(source).name) or load(source))
    monkeypatch.setattr(pictures, "_MAX_CACHED_TOKENS", 9)  # a picture of 64x64 is 4 tokens
    cache, item = PictureCache(), Item("i")
    for name in ("a", "b", "a", "c", "a", "b", "a"):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (64, 64), "red").save(path)
        assert cache.image(item, str(path)).placeholder_tokens == 4
    assert read == ["a.png", "b.png", "c.png", "b.png"]
