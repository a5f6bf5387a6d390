import base64
import copy
import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest
from doubles.simulated_report import ARMS, PROTOCOLS, simulated_report
from scipy import stats

from know_hf.cards.suite_tables import tally
from know_hf.evaluation.report.pages import read_report, write_report
from know_hf.evaluation.report.tables import chosen_table, limits, result_table, validity, verdict

RECIPE = Path(__file__).parents[1] / "recipes/compare/summary.py"
COMMAND = "know-hf compare simulated\n  --seeds 10"
NASTY = '<script>alert("1")</script>&$x_{$|`**\n\x07\u202e\ud800'
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FAILED = {**ARMS, "random": ("reference", "fresh", [{}], 0.0)}  # as good as naive: the positive control fails
NUM_FIGURES = 4 + 1 + 1 + 1 + 1  # results, learning rates and budget of the tuned protocol, forgetting, landscape


@pytest.fixture(scope="module")
def report():
    return simulated_report()


def without_most_figures(report):
    return {**report, "results": report["results"][:1], "states": None, "landscape": None}


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    return write_report({**report, "command": COMMAND}, tmp_path_factory.mktemp("report"))


class Page(HTMLParser):
    """Tags and text of an HTML file."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def figures(self):
        return [base64.b64decode(image["src"].partition(",")[2]).decode() for image in self.all("img")]


def assert_in_order(text, *parts):
    places = [text.index(part) for part in parts]
    assert places == sorted(places), dict(zip(parts, places, strict=True))


def test_page_is_complete_and_starts_with_the_verdict(report, written):
    page = Page(written.html)
    first = report["results"][0]
    assert_in_order(
        page.text,
        "simulated: does it help?",
        first["verdict"],
        first["validity"],
        first["verdict_on_methods"],
        "All comparisons",
        first["sensitivity"],
    )
    for result in report["results"]:
        assert page.text.count(result["verdict"].partition(": ")[2]) == 1, "each verdict once"
    assert COMMAND in page.source
    assert "Trajectory seeds: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in page.text
    assert report["created_with"]["torch"] in page.text
    assert all(limit in page.text for limit in limits(report))
    assert len(page.all("img")) == NUM_FIGURES
    assert len(page.all("table")) == 1 + 4 + 4 + 1 + 1 + 1 + 1 + 1
    assert len(page.all("details")) == 2 + 2  # the second measure of a protocol, task and protocols


def test_page_is_accessible_and_needs_no_other_file(written):
    page = Page(written.html)
    assert not page.all("script")
    assert all(link["href"] == "data:," for link in page.all("link"))
    assert all(link["href"].startswith("#part-") for link in page.all("a"))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for svg in page.figures():
        minidom.parseString(svg)
        assert set(re.findall(r"https?://([^/\"' )]+)", svg)) <= {"www.w3.org"} and "prefers-color-scheme:dark" in svg
    assert page.all("html")[0]["lang"] == "en"
    assert all(len(image["alt"]) > 60 for image in page.all("img"))
    assert {head["scope"] for head in page.all("th")} == {"col", "row"}
    regions = [attributes for _, attributes in page.tags if attributes.get("role") == "region"]
    assert len(regions) == len(page.all("table")) + len(page.all("img"))
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(written, scheme):
    """WCAG 2.2 asks for 4.5:1."""
    style = written.html.read_text().partition("<style>")[2]
    colours = dict(re.findall(r"--(\w+): #(\w{6})", re.findall(r":root \{([^}]*)\}", style)[scheme]))

    def luminance(colour):
        channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for front in ("ink", "muted", "accent", "good", "bad"):
        for back in ("paper", "raised"):
            bright, dim = sorted([luminance(colours[front]), luminance(colours[back])], reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (front, back)


def test_markdown_shows_the_figures_beside_it(written, report, tmp_path):
    text = written.markdown.read_text()
    assert text.startswith("# simulated: does it help?\n\n**Few-shot fine-tuning, accuracy: known-1")
    assert "\n\n\n" not in text
    shown = re.findall(r"!\[[^\]]+\]\((figures/[\w-]+\.svg)\)", text)
    assert shown == [path.relative_to(written.html.parent).as_posix() for path in written.figures]
    differences = [f"difference-{number}" for number in range(1, 5)]
    others = ["learning-rates-1", "budget-1", "forgetting", "landscape"]
    assert [path.stem for path in written.figures] == [*differences, *others]
    for path in written.figures:
        minidom.parse(str(path))
    assert "| **known-1** | method |" in text
    assert f"```bash\n{COMMAND}\n```" in text
    assert {path.name for path in written.html.parent.iterdir()} == {"report.html", "report.md", "figures"}
    (tmp_path / "report.json").write_text(json.dumps({**report, "command": COMMAND}))
    again = write_report(tmp_path, tmp_path)
    assert again.html.read_bytes() == written.html.read_bytes(), "deterministic"
    assert again.markdown.read_bytes() == written.markdown.read_bytes()


def test_result_table(report):
    shown = result_table(report, 0)
    assert [row[0] for row in shown.rows] == ["naive", "known-1", "shrink", "average", "oracle", "random"]
    assert shown.marked == {"known-1", "average"}
    naive, known = shown.rows[:2]
    values = report["results"][0]["arms"]["known-1"]
    assert naive[3:] == ["–"] * 4 and known[4] == "< 0.001"
    assert known[2].startswith(f"{100 * values['mean']:.1f} [")
    assert known[3].startswith(f"{100 * values['minus_naive']['mean']:+.1f} [+")
    assert shown.head[2:4] == ["accuracy %", "minus naive, points"]
    assert "| --- | --- |" + " ---: |" * 5 in shown.markdown()
    assert [row[0] for row in result_table(report, 1).rows] == [row[0] for row in shown.rows], "lower is better"


def test_chosen_table_and_the_edge_of_the_grid(report):
    rows = {row[0]: row for row in chosen_table(report, "few-shot").rows}
    assert rows["naive"] == ["naive", "0.01", "0.01 to 0.01", "0%", "–"]
    assert re.fullmatch(r"factor 0\.\d \(\d+%\), factor 0\.\d \(\d+%\)", rows["shrink"][4])
    assert chosen_table(report, "source") is None
    moved = copy.deepcopy(report)
    for trial in moved["chosen"]["few-shot"]["average"][:4]:
        trial["learning_rate"] = 0.1
    assert {row[0]: row for row in chosen_table(moved, "few-shot").rows}["average"][3] == "40%"
    assert not any("too narrow" in text for text in limits(moved)), "two of three rates are edges"
    for trial in moved["chosen"]["few-shot"]["average"]:
        trial["learning_rate"] = 0.13  # beyond the grid
    assert any("too narrow" in text and "average (100%, by chance 67%)" in text for text in limits(moved))


def test_failed_positive_control_comes_before_any_number(tmp_path):
    failed = simulated_report(arms=FAILED)
    assert failed["results"][0]["valid"] is False
    files = write_report(failed, tmp_path)
    body = Page(files.html).text
    head = body[body.index("does it help?", body.index("does it help?") + 1) :]
    assert_in_order(head, "the positive control failed", "shows nothing: naive", "All comparisons")
    assert not re.search(r"\d", head[: head.index("the positive control failed")])
    assert body.count("The positive control failed: this section shows nothing.") == 4
    assert "shows nothing" in body[body.rindex("All comparisons") :]
    assert_in_order(files.markdown.read_text(), "the positive control failed", "## All comparisons")


@pytest.mark.parametrize(
    ("valid", "headroom", "status"),
    [
        (True, True, "valid"),
        (True, None, "valid"),
        (True, False, "unknown"),
        (None, False, "unknown"),
        (False, True, "invalid"),
    ],
)
def test_positive_control(report, valid, headroom, status):
    changed = {**report["results"][0], "valid": valid, "headroom": headroom}
    assert validity({**report, "results": [changed]}) == (status, changed["validity"])


def test_missing_measurements(report, tmp_path):
    bare = copy.deepcopy(without_most_figures(report))
    for curve in bare["curves"]:
        values = curve["measures"]["accuracy"]
        values["test"][2] = values["test_ci95"][2] = values["validation"][2] = None
    assert "diverged" in write_report(bare, tmp_path).html.read_text()
    bare |= {
        "curves": [],
        "budgets": [],
        "chosen": {},
        "arms": {name: {**arm, "kind": "x"} for name, arm in bare["arms"].items()},
    }
    page = Page(write_report(bare, tmp_path).html)
    assert len(page.all("img")) == 1
    assert "The command was not recorded." in page.text and "No oracle was run" in page.text
    page = Page(write_report({**bare, "results": []}, tmp_path).html)
    assert "Nothing was compared" in page.text and not page.all("img")


def test_one_trajectory_is_a_warning(tmp_path):
    page = Page(write_report(simulated_report(num_seeds=1, draws=12), tmp_path).html)
    assert_in_order(page.text, "Warning: There is only one trajectory", "All comparisons")
    assert "over 12 draws of one trajectory" in page.text
    assert len(page.all("img")) == NUM_FIGURES - 2  # zero-shot, one trajectory has one value and no interval
    alone = simulated_report(num_seeds=1)
    assert "Nothing was compared" in verdict(alone) and validity(alone)[0] == "unknown"


def test_names_from_others_remain_text(tmp_path):
    arms = {f"a{NASTY}" if name == "average" else name: arm for name, arm in ARMS.items()}
    nasty = simulated_report(name=NASTY, arms=arms)
    nasty |= {"description": NASTY, "warnings": [NASTY], "task": {NASTY: [NASTY]}}
    nasty["protocols"] = {key: {**value, "what": f"{value['what']} {NASTY}"} for key, value in PROTOCOLS.items()}
    for result in nasty["results"]:
        for key in ("what", "verdict", "validity", "sensitivity", "verdict_on_methods"):
            result[key] += NASTY
    files = write_report({**nasty, "command": f"know-hf {NASTY}"}, tmp_path)
    page = Page(files.html)
    assert not page.all("script")
    assert "<script" not in page.source and "\x07" not in page.source and "\u202e" not in page.source
    assert page.text.count('<script>alert("1")</script>') > 20
    assert len(page.all("img")) == NUM_FIGURES
    for svg in page.figures():
        minidom.parseString(svg)
        assert "<script" not in svg
    assert any("&lt;script&gt;" in svg for svg in page.figures())
    markdown = files.markdown.read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside and "&#60;script&#62;" in outside
    assert all(line.count("|") > 2 for line in outside.splitlines() if line.startswith("| "))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "version 2.*up to 1"),
        ({"schema_version": "1"}, "version '1'"),
        ({"arms": {"random": {}}}, "naive.*random"),
        (None, "report.json .*not a JSON object"),
        ({"landscape": "x"}, "report.json .*another kind"),
        ({"seeds": ["\ud800"]}, "report.json .*another kind"),
    ],
)
def test_unreadable_reports_raise(report, tmp_path, changes, message):
    (tmp_path / "report.json").write_text(json.dumps([] if changes is None else {**report, **changes}))
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report.json", tmp_path)
    with pytest.raises(ValueError, match="curves, chosen"):
        read_report({key: value for key, value in report.items() if key not in ("curves", "chosen")})


def test_verdict_names_the_control_that_a_method_does_not_beat():
    first = verdict(simulated_report())
    assert "known-1 (+3.9 points" in first and "trivial" not in first
    alike = verdict(simulated_report(arms={**ARMS, "shrink": ("control", "predicted", [{}], 0.05)}))
    assert alike.endswith("trivial control: known-1 (against shrink).")


def write_reports(folder, arms):
    for name, of_report in arms.items():
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(json.dumps(simulated_report(name, of_report)))


def test_summary_shows_reports_side_by_side(report, tmp_path, capsys, run_script):
    failed, summary = {**FAILED, "known-2": ("method", "predicted", [{}], 0.0)}, partial(run_script, RECIPE)
    write_reports(tmp_path, {"simulated": ARMS, "failed": failed})
    condensed = tmp_path / "comparisons.json"
    printed = summary(tmp_path / "simulated", tmp_path / "failed", "--output", condensed)
    assert summary(condensed) == printed
    assert summary(tmp_path / "simulated", condensed, "--protocol", "source", "--pages")
    assert (tmp_path / "simulated" / "report.html").exists() and not (tmp_path / "failed" / "report.html").exists()
    assert summary(condensed, "--arms", "oracle", "--protocol", "source").count("\n") == 5
    present = {"--arms": "known-1", "--minus": "known-1", "--protocol": "few-shot", "--measure": "loss"}
    for flag, available in present.items():
        with pytest.raises(SystemExit, match="1"):
            summary(condensed, flag, "known-11")
        assert re.search(f"{flag}: no report has 'known-11'; .*{available}", capsys.readouterr().err)
    first, second = printed.split("\n\n")
    rows = {cells[1]: cells[2:4] for line in first.splitlines() if (cells := [c.strip() for c in line.split("|")])}
    assert rows["few-shot"] == ["simulated", "failed"] and second.startswith("| source (zero-shot) |")
    assert rows["positive control"] == ["passed", "failed"]
    values = report["results"][0]["arms"]["known-1"]["minus_naive"]
    low, high = values["ci95"]
    assert rows["known-1"][0] == f"{100 * values['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] ↑"
    assert rows["shrink"][0].startswith(("+", "-")) and rows["known-2"][0] == ""
    assert all(rows[arm][1].startswith("(") for arm in ("random", "known-1", "known-2"))
    with pytest.raises(SystemExit, match="nothing does not exist"):
        summary(tmp_path / "nothing")
    reports = json.loads(condensed.read_text())
    outcome = tally(reports, "few-shot", "known-1")
    assert outcome == {"better": ["simulated"], "worse": [], "neither": [], "unclear": []}
    assert tally(reports, "few-shot", "shrink")["neither"] == ["simulated"]
    reports[0]["results"][0]["headroom"] = False
    assert tally(reports, "few-shot", "shrink")["unclear"] == ["simulated"]
    assert tally(reports, "few-shot", "known-1")["better"] == ["simulated"]


def test_summary_averages_over_suites(report, tmp_path, run_script):
    write_reports(tmp_path, arms := {"a": ARMS, "b": ARMS, "failed": FAILED})
    options = ["--protocol", "few-shot", "--arms", "known-1", "--mean", "only"]

    def last_line(*others):
        return run_script(RECIPE, *others, *options).splitlines()[-1]

    last = last_line(*(tmp_path / name for name in arms), "--output", tmp_path / "results.json")
    (low, high), count = report["results"][0]["arms"]["known-1"]["minus_naive"]["ci95"], len(report["seeds"])
    # two equal suites: half of the variance, twice the degrees of freedom
    shrunk = stats.t.ppf(0.975, 2 * (count - 1)) / stats.t.ppf(0.975, count - 1) / 2**0.5
    middle, half = 50 * (low + high), 50 * (high - low) * shrunk
    assert last == f"| known-1 | {middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}] (2) |"
    known, shrink = (np.array(report["results"][0]["arms"][arm]["per_seed"]) for arm in ("known-1", "shrink"))
    minus_shrink = last_line(tmp_path / "results.json", "--minus", "shrink")
    assert minus_shrink.startswith(f"| known-1 | {100 * (known - shrink).mean():+.1f} [")


def test_summary_averages_draws_of_one_trajectory(tmp_path, run_script):
    difference = {"mean": 0.1, "ci95": [0.0, 0.2]}
    arms = {"naive": {"mean": 0.5, "ci95": [0.4, 0.6]}, "known-1": {"minus_naive": difference}}
    measure = {"name": "accuracy", "scale": 100, "digits": 1}
    result = {"protocol": "few-shot", "measure": measure, "valid": True, "headroom": None, "arms": arms}
    report = {"seeds": [0], "draws": 3, "results": [{**result, "better": [], "worse": []}]}
    file = tmp_path / "reports.json"
    file.write_text(json.dumps([{**report, "name": name} for name in "ab"]))
    half = 10 / stats.t.ppf(0.975, 2) * stats.t.ppf(0.975, 4) / 2**0.5
    assert f"{10 - half:+.1f}, {10 + half:+.1f}] (2) |" in run_script(RECIPE, file, "--mean")


@pytest.mark.skipif(not CHROMIUM or not CHROMEDRIVER, reason="needs chromium and chromedriver")
def test_page_in_a_browser(written, report):
    """Layout at two widths and in both colour schemes, and no request or message."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, Service(CHROMEDRIVER)) as browser:
        for width, dark in ((360, False), (360, True), (1100, False)):
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(written.html.as_uri())
            browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
            sizes = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.height])")
            assert len(sizes) == NUM_FIGURES and all(wide > 300 and high > 100 for wide, high in sizes)
            assert browser.execute_script("return document.documentElement.scrollWidth") == width
            rows = browser.execute_script(
                "return [...document.querySelectorAll('#part-2 tbody tr')].map(r => r.getBoundingClientRect().height)"
            )
            assert len(rows) == len(report["arms"]) + 1 and min(rows) > 10
            outside = browser.execute_script(
                "return [...document.querySelectorAll('p, h1, h2, li, blockquote')]"
                ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.textContent)"
            )
            assert outside == []
            background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(23, 24, 27)" if dark else "rgb(254, 254, 254)")
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        requests = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        assert {url for url in requests if not url.startswith("data:")} == {written.html.as_uri()}
        assert browser.get_log("browser") == []
