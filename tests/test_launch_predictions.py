"""The page and the pictures of ``htnet predict``, as a reader meets them: in a browser, on a screen or a phone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_htnet_adapters import clips, placed, read

from htnet.config import PrepareConfig
from htnet.data.extraction import extract
from htnet.data.faces.landmarks import read_landmarks
from htnet.data.regions import MOSAIC_REGIONS
from htnet.data.synth.generate import generate
from launch.report.pictures import PANELS, REGION_COLOURS, draw_prediction, draw_wheel, flow_colours
from launch.report.predictions import write_predictions
from launch.tasks.prediction import REGIONS, Prediction

CLASSES = ("negative", "positive", "surprise")
HOSTILE = "<script>window.hacked = 1</script> & \"a\" 'b'"
BROWSER = shutil.which("chromium")
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")


def answer(name: str, *probabilities: float, warnings: tuple[str, ...] = (), **facts) -> Prediction:
    regions = dict(zip(REGIONS, (0.8, -0.4, 0.1, 0.0), strict=True))
    chosen = dict(zip(CLASSES, probabilities, strict=True))
    return Prediction(input=name, onset=3, apex=9, probabilities=chosen, regions=regions, warnings=warnings, **facts)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    raw = tmp_path_factory.mktemp("raw")
    generate(raw, datasets=["casme2"], subjects=1, clips=2, seed=5)
    entries = placed(clips(read(raw / "casme2", "casme2")), read_landmarks(raw / "casme2" / "landmarks.csv"))
    return next(iter(extract(entries, PrepareConfig(keep_frames=True)).samples))


@pytest.fixture(scope="module")
def page(sample, tmp_path_factory) -> Path:
    """A page of five clips, two of one class, one hostile, one without an answer."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "pictures").mkdir()
    answers = []
    for number, one in enumerate(
        (
            answer("casme2/sub01/EP01", 0.7, 0.2, 0.1, warnings=("less motion than in training (0.01, from 0.10 on)",)),
            answer("casme2/sub01/EP02", 0.1, 0.5, 0.4, warnings=("the frame rate is not known",)),
            answer(HOSTILE, 0.05, 0.9, 0.05, warnings=("less motion than in training (0.02, from 0.10 on)",)),
            answer("a_very_long_name_without_a_single_space_" * 4, 0.3, 0.3, 0.4),
        )
    ):
        name = f"pictures/{number:04d}.jpg"
        draw_prediction(sample, one.probabilities, one.regions, crop="anatomical").save(folder / name)
        answers.append(replace(one, picture=name))
    answers.insert(1, Prediction(input="gone.mp4", error="gone.mp4: no such file or folder"))
    write_predictions(folder, answers, CLASSES, "demo")
    return folder / "index.html"


def test_a_picture_shows_frames_flow_and_regions(sample):
    picture = draw_prediction(sample, {"one": 0.75, "other": 0.25}, dict.fromkeys(REGIONS, -0.5), crop="anatomical")
    pixels = np.asarray(picture)
    onset, apex, flow = (pixels[:, left : left + PANELS[1]][: PANELS[1]] for left in (0, 214, 428))
    assert picture.width == PANELS[0]
    assert onset.std() > 10
    assert apex.std() > 10
    for colour in REGION_COLOURS:  # each region is boxed on the apex and on the flow, none on the onset
        rgb = np.array(tuple(bytes.fromhex(colour[1:])))
        assert [bool((panel == rgb).all(axis=-1).sum() > 50) for panel in (onset, apex, flow)] == [False, True, True]
    assert len(REGION_COLOURS) == len(MOSAIC_REGIONS)


def test_the_wheel_has_the_colours_of_the_flow():
    """Right is red, up is green to yellow, rest is white; beyond the circle there is nothing."""
    wheel = np.asarray(draw_wheel(65))
    assert wheel[0, 0, 3] == 0
    assert wheel[32, 32, :3].min() > 240
    for flow, place in (((1, 0), (32, 62)), ((-1, 0), (32, 2)), ((0, 1), (62, 32)), ((0, -1), (2, 32))):
        colour = 255 * flow_colours(np.array([[flow]], np.float32), 1.0)[0, 0]
        np.testing.assert_allclose(wheel[place][:3], colour, atol=12)


def test_the_page_is_one_file_and_holds_no_foreign_markup(page):
    text = page.read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert 'src="data:image/jpeg;base64,' in text
    assert HOSTILE not in text
    assert "1 predicted clip<" not in text
    assert "5 predicted clips" in text


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, page, request):
    """The page in a window of the asked size and scheme; whatever it asks the network for is an error."""
    width, scheme = getattr(request, "param", (1280, "light"))
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    trouble: list[str] = []
    tab.on("request", lambda asked: trouble.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    tab.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.goto(page.as_uri())
    yield tab
    context.close()
    assert trouble == []


def shown(tab) -> list[str]:
    return [heading.inner_text() for heading in tab.query_selector_all("article:not([hidden]) h2")]


@in_browser
@pytest.mark.parametrize("opened", [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")], indirect=True)
def test_the_page_fits_any_screen_and_scheme(opened):
    """Nothing sticks out sideways, all pictures are there, and text stands out from what is behind it."""
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    shapes = opened.evaluate("[...document.querySelectorAll('article img')].map(({width, height}) => width / height)")
    assert shapes == pytest.approx([PANELS[0] / PANELS[1]] * 4, rel=0.03)
    assert opened.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    columns = opened.evaluate("getComputedStyle(document.querySelector('main')).gridTemplateColumns.split(' ').length")
    assert columns == (1 if opened.viewport_size["width"] == 360 else 3)
    for part in ("h1", ".soft", "article h2", "article dt", "article ul li", ".failed .answer", "select", "summary"):
        assert opened.evaluate(CONTRAST, part) >= 4.5, part
    assert opened.evaluate("window.hacked") is None


CONTRAST = """selector => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([red, green, blue]) => [red, green, blue].map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  const text = document.querySelector(selector);
  let behind = text;
  while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const two = [text, behind ?? document.body].map((node, place) =>
    light(numbers(getComputedStyle(node)[place ? "backgroundColor" : "color"]))).sort((a, b) => a - b);
  return (two[1] + 0.05) / (two[0] + 0.05);
}"""
"""Contrast of an element's text as WCAG 2 defines it: 4.5 is the least for a text of normal size."""


@in_browser
def test_clips_are_ordered_by_confidence_or_as_given(opened):
    assert [name[:17] for name in shown(opened)] == [
        HOSTILE[:17],
        "casme2/sub01/EP01",
        "casme2/sub01/EP02",
        "a_very_long_name_",
        "gone.mp4",
    ]
    opened.select_option("#order", "up")
    assert [name[:17] for name in shown(opened)][::3] == ["a_very_long_name_", HOSTILE[:17]]
    opened.select_option("#order", "given")
    assert shown(opened)[:3] == ["casme2/sub01/EP01", "gone.mp4", "casme2/sub01/EP02"]


@in_browser
def test_clips_are_filtered_by_class_and_warning(opened):
    opened.select_option("#class", "positive")
    assert shown(opened) == [HOSTILE, "casme2/sub01/EP02"]
    assert opened.inner_text("#count") == "2 of 5 clips"
    opened.select_option("#warning", label="less motion than in training")
    assert shown(opened) == [HOSTILE]
    opened.select_option("#class", "")
    assert shown(opened) == [HOSTILE, "casme2/sub01/EP01"]
    opened.select_option("#warning", "none")
    assert [name[:6] for name in shown(opened)] == ["a_very"]
    opened.select_option("#warning", "")
    opened.select_option("#class", "no answer")
    assert shown(opened) == ["gone.mp4"]
