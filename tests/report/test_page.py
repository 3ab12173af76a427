"""report.html in a real browser, from file://, and what a planted text could do there."""

import base64
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pyarrow.parquet
import pytest
from helpers_report import rows_of, write_both_arms, write_point, write_stage_1_and_2, write_traces
from markupsafe import escape

import report
from ads.arms import LABELS
from ads.report import looks, page, reader, scale, tables
from ads.report.curves import Point, make_curves
from ads.report.results import distinct_answers, read_row
from ads.stage import files
from ads.stage.inputs import fingerprint_model

# A realistic experiment, after the figures of a prototype: (tau, lam, teacher, student, direction)
DEMO = (
    (0.5, 0.0, 0.95, 0.925, "gradient"),
    (0.7, 0.0, 0.89, 0.89, "gradient"),
    (0.8, 0.0, 0.79, 0.90, "gradient"),
    (0.9, 0.0, 0.735, 0.84, "gradient"),
    (1.0, 0.0, 0.605, 0.84, "gradient"),
    (0.4, 0.15, 0.94, 0.87, "gradient"),
    (0.4, 0.25, 0.92, 0.77, "gradient"),
    (0.4, 0.35, 0.885, 0.66, "gradient"),
    (0.4, 0.5, 0.86, 0.65, "gradient"),
    (0.4, 0.7, 0.71, 0.54, "gradient"),
    (0.4, 0.9, 0.525, 0.36, "gradient"),
    (0.4, 7.0, 0.83, 0.84, "random"),
    (0.4, 0.7, 0.80, 0.82, "permuted"),
    (0.4, -0.35, 0.65, 0.57, "gradient"),
)
ONE_STEP = {"temperature": -0.015, "ADS": 0.009, "negative": -0.0146, "random": -0.014, "permuted": -0.0138}


def write_demo(folder, seeds=(1, 2, 3), num_problems=600):
    """Folders of one experiment per seed, complete with answers, losses, one-step test and contrasts."""
    for seed in seeds:
        write_demo_seed(folder / f"seed{seed}", seed, num_problems)
    return [folder / f"seed{seed}" for seed in seeds]


def write_demo_seed(exp_dir, seed, num_problems):
    rng = np.random.default_rng(seed)
    inputs = {"teacher": fingerprint_model(str(report.DEMO_MODELS / "student"))}
    baseline = (0.07, 0.06)
    write_stage_1_and_2(exp_dir, baseline, dataset="arithmetic", n=num_problems, inputs=inputs)
    for i, (tau, lam, teacher, student, direction) in enumerate(DEMO):
        shares = [float(np.clip(share + rng.normal(0, 0.015), 0, 1)) for share in (teacher, student)]
        kind = direction if direction != "gradient" else "ADS" if lam > 0 else "negative"
        change = ONE_STEP[kind if lam else "temperature"] * (1 + 0.2 * rng.normal())
        stats = {
            "teacher_nll": 0.06 + 0.5 * (1 - teacher),
            "num_tokens": {"p10": 30, "p50": 44 + round(12 * (1 - teacher)), "p90": 60, "p100": 80},
            "one_step": {
                "n": 300,
                "step_length": 0.1,
                "loss_before": 0.61,
                "loss_after": 0.61 + change,
                "change": change,
            },
        }
        more = {"direction": direction, "seed": seed, "dataset": "arithmetic", "n": num_problems}
        write_point(
            exp_dir,
            str(i),
            tau,
            lam,
            (shares[0], shares[0] - 0.02),
            (shares[1], shares[1] - 0.03),
            losses=make_losses(student, rng),
            more_stats=stats,
            parquet=True,
            **more,
        )
        if lam:
            write_contrast(exp_dir, f"a{i}", lam if direction == "gradient" else 0.4, rng)
        write_words(exp_dir / "traces" / f"c{i}.parquet")


def write_words(path):
    """What a student wrote on each problem of its test: in every other one a sum that does not hold."""
    table = pyarrow.parquet.read_table(path, columns=["id", "is_raw_correct", "is_af_correct"]).to_pydict()
    n = len(table["id"])
    wrote = [f"start with {i} . add 7 : {i} + 7 = {i + 7 + i % 2} . \\boxed{{ {i + 7} }}" for i in range(n)]
    words = {"problem": [f"{i} and 7 ?" for i in range(n)], "solution": [str(i + 7) for i in range(n)]}
    pyarrow.parquet.write_table(pyarrow.table(table | words | {"trace": wrote, "finished": [True] * n}), path)


def make_losses(student, rng):
    steps = range(7, 76, 7)
    train = [[s, float(1.1 * math.exp(-s / 20) + 0.25 + rng.normal(0, 0.01))] for s in steps]
    holdout = [
        [s, float(0.9 * math.exp(-s / 25) + 0.3 + 0.5 * (1 - student) * s / 75)] for s in (0, 19, 38, 57, 75)
    ]
    return {"train": train, "holdout": holdout}


TRACE = "Tom starts with 2 3 . He buys 7 , so 2 3 + 7 = 3 0 .\nSo the answer is \\boxed{ 3 0 } ."


def write_contrast(exp_dir, name, lam, rng, num_problems=5, trace=TRACE, problem=""):
    problems = [
        {
            "id": f"arithmetic/train/{i}",
            "problem": problem or f"Tom has {20 + i} apples and buys 7. How many apples has he now?",
            "solution": f"#### {27 + i}",
            "clean": make_side(lam, rng, trace),
            "defended": make_side(lam, rng, trace),
        }
        for i in range(num_problems)
    ]
    path = exp_dir / "traces" / f"{name}.contrast.json"
    files.write_text(path, json.dumps({"trace_name": name, "problems": problems}))
    return problems


def make_side(lam, rng, trace):
    """Tokens of one word each; the defended probability as with one alternative of Delta 0."""
    tokens = []
    for word in trace.split(" "):
        clean, delta = float(rng.beta(5, 0.6)), float(rng.normal())
        weight = clean * math.exp(lam * delta)
        tokens.append([f"{word} ", clean, weight / (weight + 1 - clean), delta])
    return {"finished": True, "is_correct": bool(rng.random() < 0.7), "tokens": tokens}


# In the browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium that keeps its console and its requests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("chromium and chromedriver are not installed: the page is not opened")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The page of a whole experiment with two seeds."""
    exp_dirs = write_demo(tmp_path_factory.mktemp("demo"), seeds=(1, 2), num_problems=200)
    report.main(list(map(str, exp_dirs)))
    return exp_dirs[0] / "report" / "report.html"


def open_page(browser, path, width=1200):
    """(console messages, addresses requested) of loading a page at a width."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [entry["message"] for entry in browser.get_log("browser")], sent


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def choose(browser, selector, number):
    from selenium.webdriver.support.select import Select

    Select(find(browser, selector)[0]).select_by_index(number)


def shown(browser):
    """(problem, texts of the traces' tokens) that the reader shows."""
    traces = "[...document.querySelectorAll('#traces-box .trace')]"
    script = f"return {traces}.map(trace => [...trace.children].map(token => token.textContent))"
    return find(browser, "#problem-text")[0].text, browser.execute_script(script)


def contrast_of(browser, demo, number=0):
    """The stored problem behind what the reader shows first."""
    label = find(browser, ".side h4")[1].text
    lam = float(label.split("\N{GREEK SMALL LETTER LAMDA} ")[1].split(",")[0])
    (point,) = [i for i, point in enumerate(DEMO) if point[1] == lam and point[4] == "gradient"]
    path = demo.parents[1] / "traces" / f"a{point}.contrast.json"
    return json.loads(path.read_text())["problems"][number]


def test_page_opens_without_a_complaint_and_asks_for_nothing(browser, demo):
    messages, sent = open_page(browser, demo)
    assert messages == []
    assert sent == [demo.as_uri()]


def test_page_shows_every_plot_and_section(browser, demo):
    open_page(browser, demo)
    headings = [heading.text for heading in find(browser, "h1, h2") if heading.is_displayed()]
    assert headings[0].startswith("At a teacher accuracy of 75") and headings[1:] == [
        "The claims, and which of them hold",
        "Students at equal teacher accuracy",
        "What a defence does to a trace",
        "The knobs",
        "The training traces",
        "What one step of the proxy says of students",
        "The students' losses",
        "The proxy's gradient",
        "All points",
    ]
    svgs = [svg for svg in find(browser, "figure svg") if svg.is_displayed()]
    assert len(svgs) == 1 + 2 + 4 + 2  # at one price, by forced answers
    assert all(svg.size["width"] > 300 and svg.size["height"] > 200 for svg in svgs)
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) > 100 and len(set(ids)) == len(ids)
    used = "return [...document.querySelectorAll('use')].map(e => e.getAttribute('xlink:href'))"
    assert "generated problems, 2 seeds" in find(browser, ".size")[0].text
    assert {link.removeprefix("#") for link in browser.execute_script(used)} <= set(ids)
    assert "teacher accuracy" in svgs[0].get_attribute("textContent")


def shown_now(browser):
    """{(price, answers)} of the plots and comparisons that are on the page now."""
    found = find(browser, "#trade-off figure, [id^=equal-] .panels > div")
    assert len(found) == 4 + 4
    displayed = [element for element in found if element.is_displayed()]
    marks = "return arguments[0].closest('section').className + ' ' + arguments[0].className"
    classes = [browser.execute_script(marks, element).split() for element in displayed]
    assert len(classes) == 2  # a plot and a comparison
    return {tuple(sorted(name for name in names if name[:3] in ("at-", "by-"))) for names in classes}


def test_switches_turn_curves_and_comparisons_to_another_price_and_other_answers(browser, demo):
    """By mouse and keyboard, and without any script; paper shows what the screen did."""
    from selenium.webdriver import Keys

    open_page(browser, demo)
    assert shown_now(browser) == {("at-accuracy", "by-af")}
    find(browser, "label:has(#price-nll)")[0].click()
    assert shown_now(browser) == {("at-nll", "by-af")}
    assert "Students at equal teacher NLL" in [heading.text for heading in find(browser, "h2")]
    find(browser, "label:has(#answers-raw)")[0].click()
    assert shown_now(browser) == {("at-nll", "by-raw")}
    find(browser, "#price-nll")[0].send_keys(Keys.ARROW_LEFT)
    assert shown_now(browser) == {("at-accuracy", "by-raw")}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert shown_now(browser) == {("at-accuracy", "by-raw")}
    assert not find(browser, ".switch")[0].is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    open_page(browser, demo, 375)
    find(browser, "#price-nll")[0].click()
    kinds = len(find(browser, "#point option")), len(find(browser, ".hit title"))
    displayed = [figure.is_displayed() for figure in find(browser, "#trade-off figure")]
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert kinds[0] == 0 and kinds[1] > 50 and displayed == [False, True, False, False]


@pytest.mark.parametrize("width", [320, 375, 1200])
def test_page_is_never_wider_than_the_screen(browser, demo, width):
    open_page(browser, demo, width)
    size = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    needed, there = browser.execute_script(size)
    assert needed <= there <= width
    first_plot = find(browser, "figure svg")[0].rect
    if width == 1200:
        assert first_plot["y"] + first_plot["height"] < 800  # the trade-off is on the first screen
    else:
        assert first_plot["y"] < 2 * 800  # on a phone, what does not hold comes first


@pytest.mark.parametrize("width", [390, 1280])
def test_no_text_of_a_plot_lies_on_another_or_outside(browser, demo, width):
    """The name of an arm lay on the axis, and knobs on each other where curves end close together."""
    open_page(browser, demo, width)
    script = """
        const found = [];
        for (const svg of document.querySelectorAll("figure svg")) {
          const frame = svg.getBoundingClientRect();
          const texts = [...svg.querySelectorAll("text")];
          const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
          if (frame.width) boxes.forEach(([text, a], i) => {
            if (a.left < frame.left || a.right > frame.right + 1) found.push(text);
            for (const [other, b] of boxes.slice(i + 1)) {
              const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
              const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
              if (across > 1 && down > 2) found.push(text + " on " + other);
            }
          });
        }
        return found;"""
    assert browser.execute_script(script) == []
    labels = [text.text for text in find(browser, "#trade-off svg text")]
    assert any(text.startswith("ADS, ") for text in labels) and any("points" in text for text in labels)


def test_a_marker_shows_its_numbers_and_a_table_has_them(browser, demo):
    """To mouse and finger, and to all else in the table below."""
    from selenium.webdriver import ActionChains

    open_page(browser, demo)
    figure = next(figure for figure in find(browser, "#trade-off figure") if figure.is_displayed())
    assert tooltip_numbers(browser) is None
    circles = figure.find_elements("css selector", ".hit")
    assert len(circles) == len(DEMO)
    figure.find_element("css selector", "summary").click()
    lines = figure.find_elements("css selector", "tr")
    assert len(lines) == 1 + len(circles) + 1  # a header, and the undistilled student
    ActionChains(browser).move_to_element(circles[0]).perform()
    name, *told = tooltip_numbers(browser)
    cells = [cell.text for cell in lines[1].find_elements("css selector", "td")]
    assert [name, "\N{GREEK SMALL LETTER TAU} 0.5"] == cells[:2]
    assert all(line.endswith(f" {cell}") for line, cell in zip(told, cells[1:], strict=True))
    rows, _ = rows_of(demo.parents[1], demo.parents[2] / "seed2")
    shares = [row["student_af_accuracy"] for row in rows if (row["tau"], row["lam"]) == (0.5, 0)]
    assert cells[3].startswith(f"{float(f'{100 * np.mean(shares):.3g}'):g} % [") and cells[4] == "2"


def test_sections_are_reached_on_a_phone(browser, demo):
    """The links were left out there."""
    open_page(browser, demo, 390)
    links = find(browser, "nav a")
    assert links[0].is_displayed() and all(link.size["height"] >= 24 for link in links if link.is_displayed())


def test_the_page_prints_on_few_sheets(browser, demo):
    open_page(browser, demo)
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"]
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(pdf))) <= 5


def test_reader_shows_whole_traces_and_another_problem_and_setting(browser, demo):
    open_page(browser, demo)
    problem, (clean, ads) = shown(browser)
    stored = contrast_of(browser, demo)
    assert problem == stored["problem"]
    assert clean == [token[0] for token in stored["clean"]["tokens"]] and "".join(ads).strip() == TRACE
    choose(browser, "#problem", 3)
    assert "23 apples" in shown(browser)[0]
    find(browser, "#next")[0].click()
    find(browser, "#next")[0].click()
    assert "20 apples" in shown(browser)[0]
    find(browser, "#previous")[0].click()
    assert "24 apples" in shown(browser)[0]
    labels = [option.text for option in find(browser, "#point option")]
    assert {label.split(":")[0] for label in labels} == {
        "ADS",
        "negative lambda",
        "random direction",
        "permuted",
    }
    choose(browser, "#point", len(labels) - 1)
    assert find(browser, ".side h4")[1].text.startswith(labels[-1]) and "24 apples" in shown(browser)[0]


def tooltip_numbers(browser):
    (tooltip,) = find(browser, "#tooltip")
    return tooltip.text.splitlines() if tooltip.is_displayed() else None


def wanted_numbers(token):
    text, clean, ads, delta = token
    return [
        json.dumps(text),
        f"clean probability {100 * clean:#.3g} %",
        f"defended probability {100 * ads:#.3g} %",
        f"change \N{MULTIPLICATION SIGN} {ads / clean:#.3g}",
        f"Delta {delta:#.3g} nats",
    ]


def close_numbers(found, wanted):
    """Texts alike but for the last of three digits: the page holds four, and rounds again."""
    assert [line.split()[0] for line in found] == [line.split()[0] for line in wanted]
    numbers = [
        [float(w) for w in line.split() if w.strip("-").replace(".", "", 1).isdigit()] for line in found[1:]
    ]
    others = [
        [float(w) for w in line.split() if w.strip("-").replace(".", "", 1).isdigit()] for line in wanted[1:]
    ]
    assert all(len(n) == 1 for n in numbers) and sum(numbers, []) == pytest.approx(sum(others, []), rel=0.01)


def test_tooltip_shows_the_numbers_to_mouse_keyboard_and_finger(browser, demo):
    from selenium.webdriver import ActionChains, Keys

    open_page(browser, demo)
    tokens = contrast_of(browser, demo)["clean"]["tokens"]
    spans = find(browser, ".trace")[0].find_elements("css selector", ".token")
    assert tooltip_numbers(browser) is None
    ActionChains(browser).move_to_element(spans[2]).perform()
    close_numbers(tooltip_numbers(browser), wanted_numbers(tokens[2]))
    ActionChains(browser).move_to_element(find(browser, "#problem-text")[0]).perform()
    assert tooltip_numbers(browser) is None

    find(browser, "#trace-reader summary")[0].send_keys(Keys.TAB)
    close_numbers(tooltip_numbers(browser), wanted_numbers(tokens[0]))
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    close_numbers(tooltip_numbers(browser), wanted_numbers(tokens[1]))
    browser.switch_to.active_element.send_keys(Keys.END)
    close_numbers(tooltip_numbers(browser), wanted_numbers(tokens[-1]))
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert tooltip_numbers(browser) is None

    open_page(browser, demo, 375)
    spans = find(browser, ".trace")[0].find_elements("css selector", ".token")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", spans[5])
    box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", spans[5])
    touch = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [touch]})
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    close_numbers(tooltip_numbers(browser), wanted_numbers(tokens[5]))
    tooltip = find(browser, "#tooltip")[0].rect
    assert tooltip["x"] >= 0 and tooltip["x"] + tooltip["width"] <= 375


def test_tokens_are_shaded_by_the_change_of_their_probability(browser, demo):
    open_page(browser, demo)
    spans = find(browser, ".trace")[1].find_elements("css selector", ".token")
    tokens = contrast_of(browser, demo)["defended"]["tokens"]
    shifts = [math.log(ads / clean) for _, clean, ads, _ in tokens]
    roots = np.sqrt(np.abs(shifts))
    for span, shift in zip(spans, shifts, strict=True):
        red, _, blue, *alpha = map(float, span.value_of_css_property("background-color")[5:-1].split(","))
        assert (red > blue) == (shift > 0) or alpha[0] < 0.01
    alphas = [float(span.value_of_css_property("background-color").rpartition(",")[2][:-1]) for span in spans]
    assert np.corrcoef(alphas, roots)[0, 1] > 0.99


def test_reader_underlines_what_a_corruption_replaced_and_shades_nothing(browser, tmp_path):
    exp_dir = write_both_arms(tmp_path / "x")
    write_point(exp_dir, "5", 0.6, 0.4, (0.8, 0.6), (0.5, 0.4), defence="corrupt")
    problems = write_contrast(exp_dir, "a5", 0.4, np.random.default_rng(0), 1)
    for side in ("clean", "defended"):
        problems[0][side]["tokens"] = [token[:2] for token in problems[0][side]["tokens"]]
    problems[0]["defended"]["replaced"] = [3, 4]
    path = exp_dir / "traces" / "a5.contrast.json"
    path.write_text(json.dumps({"trace_name": "a5", "problems": problems}))
    report.main([str(exp_dir)])
    assert open_page(browser, exp_dir / "report" / "report.html")[0] == []
    assert find(browser, ".side h4")[1].text.startswith("corrupted results: ")
    clean, corrupted = (side.find_elements("css selector", ".token") for side in find(browser, ".trace"))
    lines = [span.value_of_css_property("text-decoration-line") for span in (*clean, *corrupted)]
    assert [i - len(clean) for i, line in enumerate(lines) if line == "underline"] == [3, 4]
    shades = {span.value_of_css_property("background-color") for span in clean + corrupted}
    assert {shade.rpartition(",")[2] for shade in shades} == {" 0)"}
    corrupted[3].click()
    shown_numbers = tooltip_numbers(browser)
    assert shown_numbers[1].startswith("clean probability") and len(shown_numbers) == 3
    assert shown_numbers[2] == "replaced by the defence"


def test_print_leaves_out_what_only_a_screen_can_do(browser, demo):
    open_page(browser, demo)
    assert find(browser, ".controls")[0].is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not find(browser, ".controls")[0].is_displayed() and find(browser, ".trace")[0].is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_reader_marks_wrong_sums_and_filters_by_them(browser, tmp_path):
    """A wrong step in a trace with the right answer is what a defence is after."""
    exp_dir = write_both_arms(tmp_path / "x")
    write_point(exp_dir, "5", 0.6, 0.04, (0.8, 0.6), (0.5, 0.4))
    problems = write_contrast(exp_dir, "a5", 0.4, np.random.default_rng(0), 3)
    for problem, step, is_correct in zip(problems, ("3 0", "3 1", "3 2"), (True, True, False), strict=True):
        for side, text in (("clean", "3 0"), ("defended", step)):
            words = f"2 3 + 7 = {text} .".split(" ")
            tokens = [[word if word.isdigit() else f" {word} ", 0.5, 0.25, -0.00000449] for word in words]
            problem[side] = {"finished": True, "is_correct": is_correct, "tokens": tokens}
    (exp_dir / "traces" / "a5.contrast.json").write_text(json.dumps({"problems": problems}))
    report.main([str(exp_dir)])
    assert open_page(browser, exp_dir / "report" / "report.html")[0] == []
    assert [option.text for option in find(browser, "#filter option")] == [
        *("all problems (3)", "right answer, wrong step (1)", "right answer, no wrong step (1)"),
        "wrong answer (1)",
    ]
    assert find(browser, "#traces-box .wrong") == []
    choose(browser, "#filter", 1)
    assert "21 apples" in shown(browser)[0] and len(find(browser, "#problem option")) == 1
    wrong = find(browser, "#traces-box .wrong")
    assert "".join(span.get_attribute("textContent") for span in wrong) == "23 + 7 = 31"
    assert wrong[-1].get_attribute("data-right") == "30"
    heading = find(browser, "#traces-box h4")[1].text
    assert "1 wrong step" in heading and "NLL 0.693 nats/token" in heading
    wrong[0].click()
    assert tooltip_numbers(browser)[-1] == "Delta 0 nats"  # it was -0.00000449
    shades = [span.value_of_css_property("background-color").rpartition(",")[2] for span in wrong]
    assert {shade.strip(" )") for shade in shades} == {"0.75"}  # each the largest shift there is


def test_reader_shows_what_students_then_write(browser, demo):
    open_page(browser, demo)
    assert [option.text for option in find(browser, "#test-problem option")][0] == "1: 0 and 7 ?"
    choose(browser, "#test-problem", 1)
    assert find(browser, "#test-text")[0].text == "1 and 7 ?"
    clean, own = find(browser, "#answers-box .side")
    assert clean.text.startswith("Student of clean traces (") and own.text.startswith("Student of ADS: ")
    assert "1 wrong step" in own.text
    (wrong,) = own.find_elements("css selector", ".wrong")
    assert wrong.text.startswith("1 + 7 = 9") and wrong.get_attribute("data-right") == "8"


PLANTED = "</script><script>window.planted = 1</script><img src=x onerror='window.planted = 2'>{{title}}&lt;"


def test_planted_markup_stays_text(browser, tmp_path):
    """In problem, trace, names of models, tensors and stats: no element is made, nothing runs."""
    exp_dir = write_both_arms(tmp_path / "x")
    name = "<img src=x onerror=window.planted=3>{{finding}}"
    write_point(exp_dir, "5", 0.6, 0.02, (0.8, 0.6), (0.5, 0.4), teacher=name, more_stats={"finished": 0.5})
    stored = write_contrast(exp_dir, "a5", 0.02, np.random.default_rng(0), 2, PLANTED, PLANTED)
    (exp_dir / "traces" / "a5.yaml").rename(exp_dir / "traces" / f"{name}.yaml".replace("/", ""))
    write_point(exp_dir, "5", 0.6, 0.02, (0.8, 0.6), (0.5, 0.4), teacher=name)
    sidecar = exp_dir / "student_grads.yaml"
    stats = files.read_yaml(sidecar)
    stats["norms"][name] = 99.0
    stats["stats"][name] = name
    files.write_text(sidecar, json.dumps(stats))
    report.main([str(exp_dir)])
    path = exp_dir / "report" / "report.html"
    messages, sent = open_page(browser, path)
    assert (messages, sent) == ([], [path.as_uri()])
    assert browser.execute_script("return window.planted") is None
    assert find(browser, "img") == [] and len(find(browser, "script")) == 2
    problem, (clean, _) = shown(browser)
    assert problem == PLANTED and "".join(clean) == "".join(t[0] for t in stored[0]["clean"]["tokens"])
    text = browser.execute_script("return document.body.innerText")
    assert text.count(name) >= 4  # table, tensor, statistic and its value
    assert "<img" not in (exp_dir / "report" / "report.md").read_text()
    open_page(browser, path, 375)  # long names and reasons without an interval fit a phone, too
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375


def test_the_policy_stops_scripts_that_are_not_the_page_s(browser, demo):
    open_page(browser, demo)
    plant = "const s = document.createElement('script'); s.textContent = 'window.planted = 1';"
    browser.execute_script(f"{plant} document.body.append(s)")
    assert browser.execute_script("return window.planted") is None


def test_page_of_an_experiment_that_has_just_begun(browser, tmp_path):
    write_traces(tmp_path, "clean", 0.9, 0.9, data_split="gsm8k_holdout")
    report.main([str(tmp_path)])
    path = tmp_path / "report" / "report.html"
    assert open_page(browser, path, 375) == ([], [path.as_uri()])
    assert find(browser, "h1")[0].text.startswith("No point of temperature or ADS is complete yet")
    assert find(browser, "#point") == [] and len(find(browser, "figure svg")) == 2


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The source of axe-core, which finds what keeps people out of a page."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: axe-core is not there")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", AXE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode:
        pytest.skip(f"npm cannot install {AXE}: {result.stderr.strip()[-200:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


AXE = "axe-core@4.10.3"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_serious(browser, demo, axe, width, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    open_page(browser, demo, width)
    browser.execute_script("document.querySelectorAll('details').forEach(found => { found.open = true; })")
    browser.execute_script(axe)
    run = "const done = arguments[0]; axe.run().then(found => done(found.violations))"
    found = browser.execute_async_script(run)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in serious] == []


# Without a browser


def test_what_forced_and_raw_answers_agree_on_is_shown_once(tmp_path):
    exp_dir = tmp_path / "x"
    write_point(exp_dir, "1", 0.6, 0.0, (0.9, 0.9), (0.6, 0.6))
    write_point(exp_dir, "2", 0.6, 0.03, (0.8, 0.8), (0.5, 0.5))
    rows = [read_row(row) for row in rows_of(exp_dir)[0]]
    assert distinct_answers(rows) == {"af": "forced and raw"}
    report.main([str(exp_dir)])
    text = (exp_dir / "report" / "report.html").read_text()
    assert "Forced and raw answers" in text and 'id="answers-raw"' not in text
    write_point(exp_dir, "3", 0.6, 0.06, (0.7, 0.7), (0.5, 0.4))
    assert distinct_answers([read_row(row) for row in rows_of(exp_dir)[0]]) == {"af": "forced", "raw": "raw"}
    assert distinct_answers([]) == {"af": "forced", "raw": "raw"}


def test_the_scale_is_said_by_what_was_read(tmp_path):
    """Of shipped models by their fingerprint, of others where their weights lie; else by name."""
    shipped = report.shipped_models()
    (student,) = [key for key, folder in shipped.items() if folder.name == "student"]
    sidecar = {"config": {"teacher": "moved/away"}, "inputs": {"teacher": student}}
    assert scale.in_words([sidecar], [], ["arithmetic_test"], shipped) == (
        "Toy models of 170 thousand parameters, generated problems, no setting finished"
    )
    there = {"config": {"teacher": str(report.DEMO_MODELS / "teacher"), "student": None}, "inputs": {}}
    assert list(scale.count_parameters([there], {}).values()) == [166912]
    unknown = {"config": {"teacher": "owner/teacher-7B"}, "inputs": {}}
    assert scale.in_words([unknown, sidecar], [], ["gsm8k_test"], shipped).startswith(
        "Models: owner/teacher-7B, moved/away, no setting"
    )
    ours = {"config": {"teacher": "x/models/student_1/final"}, "inputs": {}}
    assert scale.count_parameters([ours], shipped) == {}
    assert scale.models_in_words({"a": 1_540_000_000, "b": 7_620_000_000}) == (
        "Models of 1.5 billion to 7.6 billion parameters"
    )
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert scale.count_in(tmp_path) is None


def test_an_experiment_of_which_nothing_more_is_known_has_the_usual_note(demo, tmp_path):
    known = report.DEMO_NOTES.read_text().splitlines()
    assert all(str(escape(line)) in demo.read_text() for line in known)
    report.main([str(write_both_arms(tmp_path / "x"))])
    text = (tmp_path / "x" / "report" / "report.html").read_text()
    assert str(escape(known[0])) not in text and str(escape(page.ONE_ATTACK)) in text
    assert "65 to 56 %" in text


def test_page_has_the_same_bytes_again(demo):
    before = demo.read_bytes()
    report.main([str(demo.parents[1]), str(demo.parents[2] / "seed2")])
    assert demo.read_bytes() == before


def test_every_arm_has_a_colour_on_a_light_and_on_a_dark_page(demo):
    text = demo.read_text()
    assert [text.count(f"--{looks.variable(label)}: #") for label in LABELS] == [2] * len(LABELS)


def test_names_are_never_parts_of_the_template(tmp_path):
    """They are inserted as text, in one pass: braces in them stay braces."""
    exp_dir = tmp_path / "x"
    write_point(exp_dir, "1", 0.6, 0.0, (0.9, 0.9), (0.6, 0.6), teacher="{{ script_hash }}<b>'\"&amp;")
    report.main([str(exp_dir)])
    text = (exp_dir / "report" / "report.html").read_text()
    assert "teacher {{ script_hash }}&lt;b&gt;&#39;&#34;&amp;amp;" in text and "<b>&#39;" not in text


def points_with(*paths):
    rows = [{"arm": "ADS", "tau": 0.4, "lam": 0.1 + 0.1 * i, "seed": 1} for i in range(len(paths))]
    return [Point(read_row(row), {"train": {"path": path}}) for row, path in zip(rows, paths, strict=True)]


def test_contrasts_are_few_spread_and_small(tmp_path, monkeypatch):
    for i in range(9):
        write_contrast(tmp_path, f"a{i}", 0.1, np.random.default_rng(i), num_problems=40)
    points = points_with(*(tmp_path / "traces" / f"a{i}.yaml" for i in range(10)))  # the last has no file
    lams = [c["label"].split(",")[0].split()[-1] for c in reader.load_contrasts(points)["points"]]
    assert lams == ["0.1", "0.4", "0.6", "0.9"]
    monkeypatch.setattr(reader, "MAX_CONTRAST_BYTES", 40_000)
    loaded = reader.load_contrasts(points)
    assert 20_000 < len(embedded(loaded)) <= 40_000
    assert all(0 < len(point["problems"]) < 40 for point in loaded["points"])


def test_contrasts_with_odd_numbers_and_files_that_are_none(tmp_path):
    problems = write_contrast(tmp_path, "a", 0.1, np.random.default_rng(0), num_problems=1)
    problems[0]["defended"]["tokens"][0][1:] = [0.0, 0.0, math.nan]
    path = tmp_path / "traces" / "a.contrast.json"
    path.write_text(json.dumps({"problems": problems}))
    (point,) = reader.load_contrasts(points_with(path.with_name("a.yaml")))["points"]
    assert point["problems"][0]["defended"]["tokens"][0][1:] == [0.0, 0.0, 0.0]
    problems[0]["defended"]["replaced"] = [99]
    beyond = json.dumps({"problems": problems})
    for text in ("{", "[]", '{"problems": [{"id": 1}]}', '{"problems": [3]}', beyond):
        path.write_text(text)
        with pytest.raises(ValueError, match="a.contrast.json is not a file of contrasted traces"):
            reader.load_contrasts(points_with(path.with_name("a.yaml")))


def embedded(value):
    """A value as the page embeds it for its script."""
    return str(page.make_environment().from_string("{{ value | tojson }}").render(value=value))


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "]]>", "\u2028", "&lt;", "\ud800"])
def test_embedded_json_cannot_end_its_element(text):
    found = embedded({"x": text})
    assert found.isascii() and not set("<>&") & set(found)
    assert json.loads(found) == {"x": text}


def test_losses_and_traits_are_those_of_the_sidecars(demo):
    rows, _ = rows_of(demo.parents[1])
    cells = tables.setting_cells(make_curves([Point(read_row(row), {}) for row in rows]))
    by_knobs = {tuple(line[:3]): dict(zip(cells[0], line, strict=True)) for line in cells[1:]}
    assert len(by_knobs) == len(DEMO)
    row = next(row for row in rows if row["lam"] == 0.35)
    line = by_knobs["ADS", "0.4", "0.35"]
    assert line["one step"] == f"{row['train_one_step_change']:+.4f}" and line["seeds"] == "1"
    assert line["tokens"] == str(row["train_num_tokens_p50"])
