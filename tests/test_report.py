import base64
import copy
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest
from headless_browser import BINARY, HeadlessBrowser

from know_hf.cards.suite_tables import tally
from know_hf.evaluation.comparison import ACCURACY, LOSS
from know_hf.evaluation.report.comparison_report import ComparisonReport
from know_hf.evaluation.report.pages import read_report, write_report
from know_hf.evaluation.report.tables import chosen_table, limits, result_table, validity, verdict

RECIPE = Path(__file__).parents[1] / "recipes/compare/summary.py"
RATES = (1e-3, 1e-2, 1e-1)
# name: role, kind, settings, gain in accuracy over naive
ARMS = {
    "naive": ("reference", "state", [{}], 0.0),
    "random": ("reference", "fresh", [{}], -0.08),
    "oracle": ("reference", "oracle", [{}], 0.05),
    "known-1": ("method", "predicted", [{}], 0.04),
    "shrink": ("control", "predicted", [{"factor": 0.8}, {"factor": 0.5}], 0.0),
    "average": ("control", "predicted", [{}], -0.04),
}
PROTOCOLS = {
    "few-shot": {"kind": "fine_tuning", "what": "few-shot fine-tuning", "learning_rates": list(RATES)},
    "source": {"kind": "as_they_are", "what": "the source task"},
}
NASTY = '<script>alert("1")</script>&$x_{$|`**\n\x07\u202e\ud800'


def made_up_report(name="made-up", arms=ARMS, num_seeds=10, draws=1):
    """A report in the engine's own form, of simulated trials."""
    random = np.random.default_rng(0)
    cells, seeds = [], range(num_seeds)
    of_seed = {seed: 0.7 + 0.02 * random.normal() for seed in seeds}
    for seed in seeds:
        for arm, (_, _, settings, gain) in arms.items():

            def trial(options, rate, place, seed=seed, gain=gain):
                score = of_seed[seed] + gain - 0.05 * abs(place - 1) + 0.004 * random.normal()
                both = {"accuracy": score, "loss": 1 - score}
                return {"options": options, "learning_rate": rate, "validation": both, "test": both}

            measured = {"few-shot": [], "source": [{"draw": 0, "chosen": 0, "trials": [trial(settings[0], None, 1)]}]}
            for draw in range(draws):
                tuned = [trial(options, rate, place) for options in settings for place, rate in enumerate(RATES)]
                best = int(np.argmax([t["validation"]["accuracy"] for t in tuned]))
                measured["few-shot"].append({"draw": draw, "chosen": best, "trials": tuned})
            cells.append({"seed": seed, "arm": arm, "seconds": 2.0, "measured": measured})
    states = [{"accuracy": 0.9 - 0.02 * state, "loss": 0.3 + 0.02 * state} for state in range(3)]
    points = [("Θ0", "state", 0, 0), ("Θ1", "state", 0.5, 0.2), ("Θ2", "state", 1, 0), ("known-1", "arm", -0.3, 0.1)]
    report = ComparisonReport(
        name=name,
        description="Simulated.",
        task={"dataset": "none"},
        seeds=tuple(seeds),
        draws=draws,
        trials_per_rate=1,
        arms={
            arm: {"role": role, "kind": kind, "settings": settings, "description": f"{arm} it is", "spec": {}}
            for arm, (role, kind, settings, _) in arms.items()
        },
        protocols=PROTOCOLS,
        measures=(ACCURACY, LOSS),
        cells=tuple(cells),
        trajectories=tuple(
            {"seed": seed, "num_examples": [64, 32, 16], "steps": [8, 4, 2], "seconds": 1.0, "states": states}
            for seed in seeds
        ),
        landscape={
            "seed": 0,
            "measure": "loss",
            "num_examples": 16,
            "explained": [0.7, 0.2],
            "x": [-1.0, 0.0, 1.0],
            "y": [-1.0, 0.0, 1.0],
            "loss": [[3.0, 2.0, 3.0], [2.0, 1.0, None], [3.0, 2.0, 3.0]],
            "points": [
                {"name": n, "kind": kind, "x": x, "y": y, "loss": 1.0, "off_plane": 0.1} for n, kind, x, y in points
            ],
        },
    )
    return json.loads(json.dumps(report.to_dict()))


@pytest.fixture(scope="module")
def report():
    return made_up_report()


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    return write_report(report, tmp_path_factory.mktemp("report"), command="know-hf compare made-up\n  --seeds 10")


class Page(HTMLParser):
    """What stands in an HTML page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.stack = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def pictures(page):
    return [base64.b64decode(image["src"].partition(",")[2]).decode() for image in page.all("img")]


def test_the_verdict_comes_first_and_everything_is_there(report, written):
    text = written.html.read_text()
    page = Page(text)
    body = page.text
    first = report["results"][0]
    places = [
        body.index(part)
        for part in (
            first["verdict"],
            "A gain could have shown",
            first["validity"],
            first["verdict_on_methods"],
            "All comparisons",
            "Few-shot fine-tuning, accuracy",
            first["sensitivity"],
        )
    ]
    assert body.index("made-up: does it help?") < places[0]
    assert places == sorted(places)
    assert "know-hf compare made-up\n  --seeds 10" in text
    assert "Trajectory seeds: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in body
    assert f"torch {report['created_with']['torch']}" in body
    assert all(limit in body for limit in limits(report))
    assert len(page.all("img")) == 4 + 1 + 1 + 1  # results, tuned protocols, forgetting, landscape
    assert len(page.all("table")) == 1 + 4 + 4 + 1 + 1 + 1 + 1


def test_the_page_stands_alone(written):
    text = written.html.read_text()
    page = Page(text)
    assert not page.all("script")
    assert all(link["href"] == "data:," for link in page.all("link"))
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.all("img"))
    assert all(link["href"].startswith("#part-") or link["href"] in ("#limits", "#again") for link in page.all("a"))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for svg in pictures(page):
        minidom.parseString(svg)
        assert set(re.findall(r"https?://[^\"' )]+", svg)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
        assert "prefers-color-scheme:dark" in svg


def test_the_page_can_be_read_with_a_screen_reader(written):
    page = Page(written.html.read_text())
    assert page.all("html")[0]["lang"] == "en"
    assert all(len(image["alt"]) > 60 for image in page.all("img"))
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    regions = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert all(region["tabindex"] == "0" and region["role"] == "region" for region in regions)
    assert all(region["aria-label"] for region in regions)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(written, scheme):
    """4.5:1 at least, the minimum of WCAG 2.2 for text."""
    style = written.html.read_text().partition("<style>")[2]
    rules = re.findall(r":root \{([^}]*)\}", style)[0 if scheme == "light" else 1]
    colours = dict(re.findall(r"--(\w+): #(\w{6})", rules))

    def luminance(colour):
        channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for front in ("ink", "muted", "accent", "good", "bad"):
        for back in ("paper", "raised"):
            bright, dim = sorted([luminance(colours[front]), luminance(colours[back])], reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (front, back)


def test_the_table_of_a_result_is_sorted_and_complete(report):
    shown = result_table(report, 0)
    assert [row[0] for row in shown.rows] == ["naive", "known-1", "shrink", "average", "oracle", "random"]
    assert shown.marked == {"known-1", "average"}
    naive, known = shown.rows[:2]
    values = report["results"][0]["arms"]["known-1"]
    assert naive[4:] == ["–"] * 5
    assert known[2] == f"{100 * values['mean']:.1f}"
    assert known[4] == f"{100 * values['minus_naive']['mean']:+.1f}"
    assert known[6] == "< 0.001"
    assert shown.head[2] == "accuracy %" and shown.head[4] == "minus naive, points"
    assert shown.kinds == ["text", "text"] + ["number"] * 7
    lower_is_better = [row[0] for row in result_table(report, 1).rows]
    assert lower_is_better == ["naive", "known-1", "shrink", "average", "oracle", "random"]


def test_what_was_chosen_is_told_with_its_setting_and_the_end_of_the_grid(report):
    rows = {row[0]: row for row in chosen_table(report, "few-shot").rows}
    assert rows["naive"] == ["naive", "0.01", "0.01 to 0.01", "0%", "–"]
    assert re.fullmatch(r"factor 0\.\d \(\d+%\), factor 0\.\d \(\d+%\)", rows["shrink"][4])
    assert chosen_table(report, "source") is None
    moved = copy.deepcopy(report)
    for trial in moved["chosen"]["few-shot"]["average"][:4]:
        trial["learning_rate"] = 0.1
    assert {row[0]: row for row in chosen_table(moved, "few-shot").rows}["average"][3] == "40%"
    assert not any("too short" in text for text in limits(moved)), "two of three rates are ends"
    for trial in moved["chosen"]["few-shot"]["average"]:
        trial["learning_rate"] = 0.13  # beyond the grid
    assert any("too short for them" in text and "average (100%, by chance 67%)" in text for text in limits(moved))


def test_a_suite_that_shows_nothing_says_so_before_any_number(tmp_path):
    arms = {**ARMS, "random": (*ARMS["random"][:3], 0.0)}
    found = made_up_report(arms=arms)
    assert found["results"][0]["valid"] is False
    files = write_report(found, tmp_path)
    body = Page(files.html.read_text()).text
    head = body[body.index("does it help?", body.index("does it help?") + 1) :]
    assert head.index("nothing is shown") < head.index("This suite can show nothing") < head.index("All comparisons")
    assert not re.search(r"\d", head[: head.index("nothing is shown")])
    assert body.count("This part shows nothing, whatever its numbers are") == 4
    assert "shows nothing" in body[body.index("All comparisons. Better") :]
    text = files.markdown.read_text()
    assert text.index("nothing is shown") < text.index("## All comparisons")


def test_a_training_that_diverged_leaves_a_gap(report, tmp_path):
    found = copy.deepcopy(report)
    for curve in found["curves"]:
        values = curve["measures"]["accuracy"]
        values["test"][2] = values["test_ci95"][2] = values["validation"][2] = None
    files = write_report(found, tmp_path)
    assert "Where a training diverged the curve has a gap" in files.html.read_text()
    everywhere = copy.deepcopy(found)
    for curve in everywhere["curves"]:
        curve["measures"]["accuracy"]["test"] = [None] * 3
        curve["measures"]["accuracy"]["test_ci95"] = [None] * 3
    write_report(everywhere, tmp_path)


def test_of_one_trajectory_the_page_says_first_that_it_is_one(tmp_path):
    page = Page(write_report(made_up_report(num_seeds=1, draws=12), tmp_path).html.read_text())
    assert page.text.index("Read this first There is one trajectory:") < page.text.index("All comparisons")
    assert "Intervals and tests are over 12 draws of one trajectory" in page.text
    assert len(page.all("img")) == 2 + 1 + 1 + 1  # as they are, one trajectory has one value and no interval


def test_one_draw_of_one_trajectory_compares_nothing(tmp_path):
    page = Page(write_report(made_up_report(num_seeds=1), tmp_path).html.read_text())
    assert "Nothing was compared" in page.text


def test_where_there_was_nothing_to_gain_the_box_is_not_green(report):
    found = copy.deepcopy(report)
    found["results"][0]["headroom"] = False
    assert validity(found)[:2] == ("unknown", "There may have been nothing to gain")
    found["results"][0]["valid"] = None
    assert validity(found)[:2] == ("unknown", "Whether a gain could have shown is not known")
    assert validity({**found, "results": []})[0] == "unknown"


def test_text_of_strangers_is_text(tmp_path):
    arms = {f"a{NASTY}" if name == "average" else name: arm for name, arm in ARMS.items()}
    protocols = {key: {**facts, "what": f"{facts['what']} {NASTY}"} for key, facts in PROTOCOLS.items()}
    found = made_up_report(name=NASTY, arms=arms)
    found["description"], found["warnings"] = NASTY, [NASTY]
    found["task"] = {NASTY: [NASTY]}
    found["protocols"] = protocols
    for result in found["results"]:
        for key in ("what", "verdict", "validity", "sensitivity", "verdict_on_methods"):
            result[key] += NASTY
    files = write_report(found, tmp_path, command=f"know-hf {NASTY}")
    text = files.html.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script")
    assert "<script" not in text and "\x07" not in text and "\u202e" not in text
    assert page.text.count('<script>alert("1")</script>') > 20
    assert len(page.all("img")) == 7
    for svg in pictures(page):
        minidom.parseString(svg)
        assert "<script" not in svg
    assert any("&lt;script&gt;" in svg for svg in pictures(page))
    markdown = files.markdown.read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside and "&#60;script&#62;" in outside
    assert all(line.count("|") > 2 for line in outside.splitlines() if line.startswith("| "))


def test_the_markdown_shows_the_same_with_pictures_beside_it(report, written):
    text = written.markdown.read_text()
    assert text.startswith("# made-up\n\n**In few-shot fine-tuning, accuracy, known-1")
    shown = re.findall(r"!\[[^\]]+\]\((figures/[\w-]+\.svg)\)", text)
    assert shown == [path.relative_to(written.html.parent).as_posix() for path in written.figures]
    assert [path.name for path in written.figures] == [
        "difference-1.svg",
        "difference-2.svg",
        "difference-3.svg",
        "difference-4.svg",
        "learning-rates-1.svg",
        "forgetting.svg",
        "landscape.svg",
    ]
    for path in written.figures:
        minidom.parse(str(path))
    assert "| **`known-1`** | method |" in text
    assert "```bash\nknow-hf compare made-up\n  --seeds 10\n```" in text
    assert {path.name for path in written.html.parent.iterdir()} == {"report.html", "report.md", "figures"}


def test_the_same_report_gives_the_same_bytes_from_a_file_too(report, written, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({**report, "command": "know-hf compare made-up\n  --seeds 10"}))
    again = write_report(tmp_path, tmp_path / "out")
    assert again.html.read_bytes() == written.html.read_bytes()
    assert again.markdown.read_bytes() == written.markdown.read_bytes()


def test_what_was_not_measured_is_left_out(report, tmp_path):
    bare = {**report, "states": None, "landscape": None, "curves": [], "chosen": {}, "results": report["results"][:1]}
    bare["arms"] = {name: {**arm, "kind": "state"} for name, arm in report["arms"].items()}
    page = Page(write_report(bare, tmp_path / "bare").html.read_text())
    assert len(page.all("img")) == 1
    assert re.findall(r"#part-\d+", str(page.all("a"))) == ["#part-1", "#part-2", "#part-3"]
    assert "The command was not recorded." in page.text
    assert "No oracle was run" in page.text
    empty = Page(write_report({**bare, "results": []}, tmp_path / "empty").html.read_text())
    assert "Nothing was compared" in empty.text
    assert not empty.all("img")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema version 2, this know_hf reads versions up to 1; update it"),
        ({"schema_version": "1"}, "schema version '1'"),
        ({"arms": {"random": {}}}, "no arm naive, only random"),
    ],
)
def test_reports_that_cannot_be_read_are_refused(report, changes, message):
    with pytest.raises(ValueError, match=message):
        read_report({**report, **changes})


def test_a_report_without_a_key_is_refused(report, tmp_path):
    missing = {key: value for key, value in report.items() if key not in ("curves", "chosen")}
    with pytest.raises(ValueError, match="the report has no curves, no chosen"):
        read_report(missing)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="is no report: it holds a list"):
        read_report(tmp_path)


@pytest.mark.skipif(BINARY is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(written, report, tmp_path):
    with HeadlessBrowser(tmp_path / "profile") as browser:
        for width, dark in ((360, False), (360, True), (1100, False)):
            browser.open(written.html, width=width, dark=dark)
            sizes = browser.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
            assert len(sizes) == 7
            assert all(complete and wide > 300 and high > 100 for complete, wide, high in sizes)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            rows = browser.evaluate(
                "[...document.querySelectorAll('#part-2 tbody tr')].map(row => row.getBoundingClientRect().height)"
            )
            assert len(rows) == len(report["arms"]) + 1
            assert all(height > 10 for height in rows)
            inside = browser.evaluate(
                "[...document.querySelectorAll('p, h1, h2, caption, figcaption, li, .box')]"
                ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.textContent)"
            )
            assert inside == []
            background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(23, 24, 27)" if dark else "rgb(254, 254, 254)")
        browser.evaluate("document.querySelector('details').open = true")
        assert browser.evaluate("document.querySelector('details img').getBoundingClientRect().height") > 100
        assert set(browser.requests) == {written.html.resolve().as_uri()}
        assert browser.problems == []


@pytest.mark.skipif(BINARY is None, reason="no Chromium is installed")
def test_pictures_are_drawn_in_the_colours_of_the_page(written, tmp_path):
    """The same corner of a picture, read back from the screen: paper in light and in dark."""
    from PIL import Image

    with HeadlessBrowser(tmp_path / "profile") as browser:
        for dark, paper in ((False, (254, 254, 254)), (True, (23, 24, 27))):
            browser.open(written.html, width=1100, dark=dark)
            browser.evaluate("document.images[0].scrollIntoView({block: 'start'})")
            shot = Image.open(browser.screenshot(tmp_path / f"{dark}.png")).convert("RGB")
            left, top, width, height = browser.evaluate(
                "(r => [r.left, r.top, r.width, r.height])(document.images[0].getBoundingClientRect())"
            )
            box = (int(left), int(top), int(left + width), int(min(top + height, shot.height)))
            colours = {colour: count for count, colour in shot.crop(box).getcolors(1 << 24)}
            assert max(colours, key=colours.get) == paper
            assert len(colours) > 50


@pytest.mark.skipif(BINARY is None, reason="no Chromium is installed")
def test_a_browser_that_meets_a_problem_says_so(tmp_path):
    """The instrument itself: a page that asks for more and fails is found out."""
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><img src='missing.png'><script>console.error('wrong'); undefined_name()</script>")
    with HeadlessBrowser(tmp_path / "profile") as browser:
        browser.open(page)
        assert any(address.endswith("missing.png") for address in browser.requests)
        assert any("wrong" in problem for problem in browser.problems)
        assert len(browser.problems) >= 2
        assert browser.evaluate("document.images[0].naturalWidth") == 0


def test_a_gain_that_a_trivial_control_gives_too_is_not_told_alone():
    alike = {**ARMS, "shrink": ("control", "predicted", [{}], 0.05)}
    first = verdict(made_up_report(arms=ARMS))
    assert "known-1 (+3.9 points" in first and "trivial" not in first
    told = verdict(made_up_report(arms=alike))
    assert "are significantly better than naive" in told
    assert told.endswith(" Not shown to be better than every trivial control: known-1 (against shrink).")


def test_reports_stand_side_by_side(report, tmp_path, capsys, monkeypatch):
    invalid = {**ARMS, "random": ("reference", "fresh", [{}], 0.0), "known-2": ("method", "predicted", [{}], 0.0)}
    for name, arms in (("made-up", ARMS), ("invalid", invalid)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(made_up_report(name, arms)))

    def summary(*arguments):
        monkeypatch.setattr("sys.argv", ["summary.py", *map(str, arguments)])
        runpy.run_path(str(RECIPE), run_name="__main__")
        return capsys.readouterr().out

    kept = tmp_path / "comparisons.json"
    printed = summary(tmp_path / "made-up", tmp_path / "invalid", "--output", kept)
    assert summary(kept) == printed
    assert summary(kept, "--arms", "oracle", "--protocol", "source").count("\n") == 5
    first, second = printed.split("\n\n")
    rows = {cells[1]: cells[2:4] for line in first.splitlines() if (cells := [c.strip() for c in line.split("|")])}
    assert rows["few-shot"] == ["made-up", "invalid"] and second.startswith("| source |")
    assert rows["could show a gain"] == ["yes", "no"]
    values = report["results"][0]["arms"]["known-1"]["minus_naive"]
    low, high = values["ci95"]
    assert rows["known-1"][0] == f"{100 * values['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] ↑"
    assert rows["shrink"][0].startswith(("+", "-")) and rows["known-2"][0] == ""
    assert all(rows[arm][1].startswith("(") for arm in ("random", "known-1", "known-2"))
    with pytest.raises(SystemExit, match="nothing does not exist: run know-hf compare SUITE --output-dir"):
        summary(tmp_path / "nothing")
    few = tally(json.loads(kept.read_text()), "few-shot", "known-1")
    assert few == {"better": ["made-up"], "worse": [], "neither": [], "unclear": []}
    kept_reports = json.loads(kept.read_text())
    assert tally(kept_reports, "few-shot", "shrink")["neither"] == ["made-up"]
    kept_reports[0]["results"][0]["headroom"] = False
    there_was_nothing_to_gain = tally(kept_reports, "few-shot", "shrink")
    assert there_was_nothing_to_gain["neither"] == [] and there_was_nothing_to_gain["unclear"] == ["made-up"]
    assert tally(kept_reports, "few-shot", "known-1")["better"] == ["made-up"]
