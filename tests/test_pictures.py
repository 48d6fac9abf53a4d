"""The drawings of the model are what their script draws."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import pictures

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "book" / "_static"


def stale(folder, scratch):
    """Name the drawings in a folder that the script would draw otherwise."""
    pictures.main(scratch)
    fresh = {p.name: p.read_bytes() for p in scratch.glob("model-*.svg")}
    ours = {p.name: p.read_bytes() for p in folder.glob("model-*.svg")}
    return [n for n in sorted(fresh | ours) if fresh.get(n) != ours.get(n)]


def test_drawings_are_what_the_script_draws(tmp_path):
    assert stale(STATIC, tmp_path) == [], "run: python book/_tools/pictures.py"


def test_notices_a_drawing_edited_by_hand(tmp_path):
    mine, fresh = tmp_path / "mine", tmp_path / "fresh"
    mine.mkdir(), fresh.mkdir()
    pictures.main(mine)
    path = mine / "model-data.svg"
    path.write_text(path.read_text("utf-8").replace("head", "tail"), "utf-8")
    (mine / "model-other.svg").write_text("<svg/>", "utf-8")
    assert stale(mine, fresh) == ["model-data.svg", "model-other.svg"]


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.svg")), ids=lambda p: p.name)
def test_every_drawing_can_be_read_and_heard(path):
    root = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert "viewBox" in root.attrib
    assert root.find(f"{space}title").text
    assert root.find(f"{space}desc").text
    sizes = re.findall(r'font-size="?:?\s*([\d.]+)', path.read_text("utf-8"))
    assert all(float(size) >= 13 for size in sizes), "too small for a phone"


def test_plots_and_pages_have_the_same_colours():
    style = (STATIC / "emoformer.mplstyle").read_text("utf-8")
    cycle = re.findall(r"'([0-9a-f]{6})'", style)
    css = (STATIC / "book.css").read_text("utf-8").split("html[data-theme")[0]
    names = (
        "ids embedding query key value weights residual logits "
        "anger joy optimism sadness fear love"
    ).split()
    page = [re.search(rf"--emo-{n}: #([0-9a-f]{{6}})", css)[1] for n in names]
    assert page == cycle
