"""The general calibration sets are what their writer writes."""

from __future__ import annotations

import gzip

import pytest

from qtool import resources
from qtool.inputs.panels import load_panel
from qtool.inputs.pictures import load_image
from tools.calibration.build import PICTURES, TEXT, build_picture_set, build_text_set, provenance
from tools.calibration.drawings import draw_landscape
from tools.calibration.gather import Section, gather, html_sections, man_sections, message_sections, rst_sections
from tools.calibration.sources import load_sources, load_texts

FOLDER = resources.path("calibration")


def test_the_shipped_texts_and_sources_are_what_is_written():
    assert (FOLDER / f"{TEXT}.jsonl").read_bytes() == build_text_set().content
    assert (FOLDER / "SOURCES.md").read_text(encoding="utf-8") == provenance()


def test_the_shipped_pictures_are_what_is_drawn():
    built = build_picture_set()
    assert (FOLDER / f"{PICTURES}.jsonl").read_bytes() == built.content  # which names a hash of all pixels
    shipped = {path.relative_to(FOLDER).as_posix() for path in (FOLDER / PICTURES).iterdir()}
    assert shipped == set(built.pictures)
    for path, picture in list(built.pictures.items())[:5]:
        assert load_image(FOLDER / path).tobytes() == picture.convert("RGB").tobytes()


def test_every_text_has_a_source_with_a_licence():
    sources = {source.name: source for source in load_sources()}
    assert {text.source for text in load_texts()} == set(sources)
    assert all(source.license and source.copyright for source in sources.values())
    assert {source.license for source in sources.values()} == {"Apache-2.0", "BSD-3-Clause", "PostgreSQL"}
    assert len({text.id for text in load_texts()}) == len(load_texts())


def test_a_drawing_shows_what_its_description_says_and_is_the_same_again():
    one, again, other = draw_landscape(3), draw_landscape(3), draw_landscape(4)
    assert one.picture.tobytes() == again.picture.tobytes() != other.picture.tobytes()
    assert one.description == again.description
    assert one.query.split()[0].rstrip("s") in one.description


def test_sections_are_chosen_by_length_and_lot():
    body = "One sentence of the text. " * 30
    sections = [Section("en", f"Title {number}", body, f"{number}.html") for number in range(20)]
    chosen = gather(iter(sections), {"en": 2000})
    assert chosen == gather(iter(reversed(sections)), {"en": 2000})
    assert 2000 <= sum(len(section.text) for section in chosen) < 3000
    short = [Section("en", "Short", "Too short.", "a"), Section("de", "Title", body, "b")]
    assert gather(iter(short), {"en": 2000}) == []
    long = gather(iter([Section("ja", "題", "短い文です。" * 200, "c")] * 2), {"ja": 5000})
    assert long == []  # a title of one letter
    (cut,) = gather(iter([Section("ja", "題と名", "短い文です。" * 200, "c")] * 2), {"ja": 5000})
    assert cut.text.endswith("。")
    assert len(cut.text) <= 650


@pytest.mark.parametrize("language", ["de", "en"])
def test_pages_without_menus_footers_and_untranslated_parts(language, tmp_path):
    (tmp_path / language).mkdir()
    body = "Der Server bindet sich an Adressen und Ports der lokalen Maschine. " * 5
    english = "This is the part of the page that is left in English, and it is of no use to the reader. " * 3
    (tmp_path / language / "page.html").write_text(
        f'<html lang="de"><body><div class="toplang"><p>menu</p></div><h1>Titel <a class="permalink">#</a></h1>'
        f"<p>{body}<table><tr><td>cell</td></tr></table></p><h2>Rest</h2><p>{english}</p>"
        f'<div class="bottomlang"><p>footer</p></div></body></html>',
        encoding="utf-8",
    )
    found = list(html_sections(tmp_path))
    if language == "en":  # a page in another language than its folder's
        assert found == []
    else:
        (section,) = found
        assert (section.language, section.title, section.place) == ("de", "Titel", "de/page.html")
        assert section.text.startswith("Der Server")
        assert "menu" not in section.text
        assert "cell" not in section.text
        assert "footer" not in section.text


def test_restructured_text_and_man_pages_become_plain(tmp_path):
    (tmp_path / "page.txt").write_text("=====\nTitle\n=====\n\nSee :doc:`the page </page>` and ``code``.\nMore.\n")
    (section,) = rst_sections(tmp_path)
    assert (section.title, section.text) == ("Title", "See the page and code. More.")
    page = '.SH "NAME"\nALTER_VIEW \\- change it\n.SH "DESCRIPTION"\n.PP\n\\fBALTER\\fR\nchanges a view\\&.\n'
    (tmp_path / "page.7.gz").write_bytes(gzip.compress(page.encode()))
    (section,) = man_sections(tmp_path)
    assert (section.title, section.text) == ("ALTER VIEW - change it", "ALTER changes a view.")
    assert list(message_sections(tmp_path)) == []


def test_the_sets_load():
    for name, modality in ((TEXT, "text"), (PICTURES, "mixed")):
        assert load_panel(FOLDER / f"{name}.jsonl").modality == modality
