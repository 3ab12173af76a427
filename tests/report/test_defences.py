"""Every defence and cap in one report: named in few words, told apart without colour, with its price."""

import io
import itertools
import json
import warnings

import numpy as np
import pytest
import yaml
from helpers_report import PROXY, curves_of, rows_of, write_both_arms, write_point, write_stage_1_and_2

import report
from ads.report import figures, looks, page, plots, reader, tables
from ads.report.claims import choose_arms
from ads.report.experiments import load_experiments
from ads.report.points import collect_points
from ads.stage import files

TAU, LAM = "\N{GREEK SMALL LETTER TAU}", "\N{GREEK SMALL LETTER LAMDA}"
AT_MOST = "\N{LESS-THAN OR EQUAL TO}"
# (tau, lam, settings of the point, label of its curve)
POINTS = (
    (0.4, 0.0, {}, f"temperature, {TAU} = 0.4 to 1.3"),
    (1.3, 0.0, {}, f"temperature, {TAU} = 0.4 to 1.3"),
    (0.4, 6.2, {}, f"ADS, {TAU} = 0.4, {LAM} = 6.2"),
    (0.4, 6.2, {"max_kl": 0.2}, f"ADS, {TAU} = 0.4, {LAM} = 6.2, KL {AT_MOST} 0.2"),
    (0.4, 6.2, {"max_kl": 0.1}, f"ADS, {TAU} = 0.4, {LAM} = 6.2, KL {AT_MOST} 0.1"),
    (0.4, 6.2, {"keep_top1": True}, f"ADS, {TAU} = 0.4, {LAM} = 6.2, top-1 kept"),
    (0.4, -1.0, {}, f"negative lambda, {TAU} = 0.4, {LAM} = -1"),
    (0.4, 6.2, {"defence": "random"}, f"random direction, {TAU} = 0.4, {LAM} = 6.2"),
    (0.4, 6.2, {"defence": "permuted"}, f"permuted, {TAU} = 0.4, {LAM} = 6.2"),
    (2.0, 0.5, {"defence": "poe"}, f"PoE, {TAU} = 2, {LAM} = 0.5"),
    (
        *(2.0, 0.5, {"defence": "poe", "max_kl": 0.1, "keep_top1": True}),
        f"PoE, {TAU} = 2, {LAM} = 0.5, KL {AT_MOST} 0.1, top-1 kept",
    ),
    # plausibility has no effect here
    (1.2, 1.0, {"defence": "gated_poe", "plausibility": 0.5}, f"gated PoE, {TAU} = 1.2, {LAM} = 1"),
    (1.2, 2.0, {"defence": "contrastive"}, f"contrastive, {TAU} = 1.2, {LAM} = 2"),
    (
        *(1.2, 2.0, {"defence": "contrastive", "plausibility": 0.01}),
        f"contrastive, {TAU} = 1.2, {LAM} = 2, plausibility 0.01",
    ),
    (0.4, 0.4, {"defence": "corrupt"}, f"corrupted results, {TAU} = 0.4, {LAM} = 0.4"),
    (0.4, 0.0, {"defence": "external", "published": "p"}, f"made elsewhere, {TAU} = 0.4"),
    (0.4, 0.0, {"defence": "answer_only"}, f"answer only, {TAU} = 0.4"),
    (0.4, 0.0, {"defence": "truncated"}, f"truncated, {TAU} = 0.4"),
)
PRICED = {"kl": 0.05, "lam": 0.4, "capped": 0.1}


def write_every_defence(exp_dir, points=POINTS):
    """One experiment of all of them, as the stages write it today."""
    write_stage_1_and_2(exp_dir)
    for i, (tau, lam, settings, _) in enumerate(points):
        defence = settings.get("defence", "ads")
        has_score = lam and defence != "corrupt"
        nll = {"teacher_nll": 11.0 if defence == "answer_only" else 0.02 + 0.03 * i}
        price = (PRICED if has_score else {}) | {"num_models": 2 if has_score else 1}
        shares = (0.95 - 0.03 * i, 0.9 - 0.03 * i), (0.8 - 0.04 * i, 0.78 - 0.04 * i)
        write_point(exp_dir, str(i), tau, lam, *shares, more_stats=nll | price, **settings)
    return exp_dir


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return write_every_defence(tmp_path_factory.mktemp("defences") / "x")


def test_a_cap_is_named_once_where_it_is_set_and_nowhere_else(every):
    """Each label held "traces max_kl null, traces keep_top1 false", and the teacher's test the same again."""
    assert {curve.label for curve in curves_of(every)} == {label for *_, label in POINTS}
    cells = tables.point_cells([point.row for point in collect_points(load_experiments([every]))])
    assert f"PoE, KL {AT_MOST} 0.1, top-1 kept" in [line[0] for line in cells]
    assert not {"null", "false", "true"} & {cell for line in cells for cell in line}
    assert not any("max_kl" in cell or "keep_top1" in cell for cell in cells[0])


def test_caps_are_columns_of_their_own_and_none_of_a_stage(every):
    rows, _ = rows_of(every)
    assert not [
        key for row in rows for key in row if key.endswith((".max_kl", ".keep_top1", ".plausibility"))
    ]
    found = [{key: row[key] for key in ("max_kl", "keep_top1", "plausibility") if key in row} for row in rows]
    assert sorted(map(str, filter(None, found))) == sorted(
        [
            *("{'max_kl': 0.2}", "{'max_kl': 0.1}", "{'keep_top1': True}"),
            *("{'max_kl': 0.1, 'keep_top1': True}", "{'plausibility': 0.01}"),
        ]
    )


def test_traces_made_elsewhere_are_joined_by_their_folder(tmp_path):
    """Training and test traces are files of their own: by their fingerprints no point was ever complete."""
    for i, folder in enumerate(("a/mine", "a/theirs")):
        shares = (0.9 - 0.1 * i,) * 2, (0.5 - 0.1 * i,) * 2
        write_point(tmp_path, folder[2:], 0.4, 0.0, *shares, defence="external", published=folder)
    for path in tmp_path.glob("traces/*.yaml"):
        record = files.read_yaml(path)
        if record["config"].get("published"):
            record["inputs"] = {**(record.get("inputs") or {}), "published": f"sha256 of {path.stem}"}
            path.write_text(yaml.safe_dump(record))
    rows, _ = rows_of(tmp_path)
    found = [(row["teacher_raw_accuracy"], row["student_raw_accuracy"]) for row in rows]
    assert sorted(found) == [(0.8, 0.4), (0.9, 0.5)]


def test_a_setting_that_all_curves_but_one_leave_at_its_default_is_named_on_that_one(tmp_path):
    for i, more in enumerate(({}, {"defence": "poe"}, {"defence": "poe", "top_p": 0.5})):
        write_point(tmp_path, str(i), 0.6, 0.5, (0.8 - 0.1 * i,) * 2, (0.5,) * 2, **more)
    named = f"{TAU} = 0.6, {LAM} = 0.5"
    assert [curve.label for curve in curves_of(tmp_path)] == [
        *(f"ADS, {named}", f"PoE, {named}", f"PoE, {named}, top_p 0.5")
    ]


def test_claims_are_about_the_curve_without_a_cap(tmp_path):
    """A capped curve of more settings would have stood for ADS without a word."""
    exp_dir = write_both_arms(tmp_path / "x")
    for i, lam in enumerate((0.01, 0.02, 0.04, 0.05)):
        write_point(exp_dir, f"c{i}", 0.6, lam, (0.8, 0.7), (0.5, 0.4), max_kl=0.1)
    assert choose_arms(curves_of(exp_dir))["ADS"].caps == []


def keys_of(curves):
    return [(plots.MARKERS[curve.arm], look) for curve, look in looks.looks(curves)]


def test_curves_are_told_apart_by_marker_filling_and_dashes(every):
    """Capped variants of one arm had one look in the plots, where they are single points."""
    curves = curves_of(every)
    keys = keys_of(curves)
    assert len(set(keys)) == len(curves) == len(POINTS) - 1
    assert len({(marker, look.fill) for marker, look in keys}) == len(curves), "where no line is drawn"
    kinds = {curve.label: look for curve, look in looks.looks(curves)}
    assert kinds[POINTS[2][3]] == kinds[POINTS[9][3]] == looks.LOOKS[0]
    assert kinds[POINTS[5][3]].fill == "left" and kinds[POINTS[10][3]].fill == "right"


def grey(figure):
    """The figure as grey values (H, W)."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return np.asarray(Image.open(file).convert("L"), int)


def test_legend_keys_differ_in_black_and_white(every, monkeypatch):
    """Drawn in one ink, each line of the legend is another picture."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(plots, "COLOURS", dict.fromkeys(plots.COLOURS, "black"))
    pictures = []
    for curve, look in looks.looks(curves_of(every)):
        figure = Figure(figsize=(0.5, 0.2))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], **plots.line_look(curve, look))
        axis.set_axis_off()
        pictures.append(grey(figure))
    least = min(np.abs(one - other).sum() for one, other in itertools.combinations(pictures, 2))
    assert least > 10 * 255, "ten pixels of ink"


@pytest.mark.parametrize("num_panels", (1, 2, 4))
def test_axes_do_not_collapse_under_a_long_legend(every, num_panels):
    """Twelve curves' legend took the height of a figure of fixed size, and matplotlib gave the layout up."""
    from matplotlib import style

    curves = curves_of(every)
    axes = plots.Axes("raw")

    def draw(axis):
        return plots.draw_tradeoff(axes, curves, [], None, axis)

    with style.context(figures.STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.compose([figures.Panel("title", draw)] * num_panels, "a title " * 20)
        figure.draw_without_rendering()
    heights = [axis.get_window_extent().height / figure.dpi for axis in figure.axes if axis.get_visible()]
    assert len(heights) == num_panels and min(heights) > 2.2
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1
    assert [text.get_text().replace("\n", " ") for text in legend.get_texts()] == [c.label for c in curves]


def draw_at_the_edge(axis):
    """A marker at the right end of its axes, and a label that is wider than what is beside it."""
    axis.plot([0, 1], [0, 1], label="a line")
    axis.set(ylabel="student accuracy")
    return figures.Drawn(
        labels=[figures.Label(1.0, 0.5, "corrupted results, 0.7", "black")], spots=[(1.0, 0.5, 0)]
    )


def test_a_label_stays_off_the_next_axes():
    """It once ran over the numbers of the axes beside it."""
    figure = figures.compose([figures.Panel("title", draw_at_the_edge)] * 2, "")
    renderer = figure.canvas.get_renderer()
    first, second = figure.axes
    (label,) = first.texts
    next_one = min(t.get_window_extent(renderer).x0 for t in (*second.get_yticklabels(), second.yaxis.label))
    assert label.get_window_extent(renderer).x1 < next_one


def test_prices_that_one_text_stretches_are_drawn_on_a_log_scale(every, tmp_path):
    """The NLL of bare answers pressed all other arms onto the axis."""
    drawn = {}
    for name, exp_dir in (("wide", every), ("narrow", write_both_arms(tmp_path / "x"))):
        panels = plots.make_panels(curves_of(exp_dir), [], [])
        figure = figures.compose(panels["tradeoff"], "")
        drawn[name] = [axis.get_xscale() for axis in figure.axes]
    assert drawn == {"wide": ["linear", "log"] * 2, "narrow": ["linear"] * 4}


def test_every_arm_has_its_price(every):
    """KL, models held and milliseconds a token; temperature has a KL of 0, and what is not measured is -."""
    cells = tables.point_cells([point.row for point in collect_points(load_experiments([every]))])
    lines = [dict(zip(cells[0], line, strict=True)) for line in cells[1:]]
    shown = {line["arm"]: tuple(line[key] for key in ("KL(q||p)", "models", "ms/token")) for line in lines}
    assert shown["temperature"] == (".000", "1", ".810")
    assert shown["ADS"] == shown["PoE"] == (".050", "2", ".810")
    for arm in ("corrupted results", "made elsewhere", "answer only", "truncated"):
        assert shown[arm] == ("-", "1", ".810")
    settings = tables.setting_cells(curves_of(every))
    by_name = {line[0]: dict(zip(settings[0], line, strict=True)) for line in settings[1:]}
    assert len(by_name) == len(POINTS) - 1
    assert by_name["ADS, top-1 kept"]["KL(q||p)"] == ".050" and by_name["truncated"]["models"] == "1"
    assert {line.split(":")[0] for line in tables.legend_of(collect_rows(every))} >= {
        *("KL(q||p)", "models", "ms/token", "lam_t, capped")
    }


def collect_rows(exp_dir):
    return [point.row for point in collect_points(load_experiments([exp_dir]))]


def test_an_experiment_from_before_prices_were_measured_has_no_columns_for_them(tmp_path):
    cells = tables.point_cells(collect_rows(write_both_arms(tmp_path / "x")))
    assert not {"KL(q||p)", "models", "lam_t", "capped"} & set(cells[0])


def write_contrast(exp_dir, name, side, tokens, replaced=None):
    sides = {"clean": make_side(tokens), side: make_side(tokens)}
    if replaced is not None:
        sides[side]["replaced"] = replaced
    problems = [{"id": str(i), "problem": f"problem {i}", "solution": "7", **sides} for i in range(2)]
    text = json.dumps({"trace_name": name, "problems": problems})
    files.write_text(exp_dir / "traces" / f"{name}.contrast.json", text)


def make_side(tokens):
    return {"finished": True, "is_correct": True, "tokens": tokens}


SCORED = [["a ", 0.5, 0.25, -0.5], ["7", 0.5, 0.75, 0.5]]
PLAIN = [["= ", 0.5], ["7", 0.5]]


@pytest.fixture(scope="module")
def contrasted(tmp_path_factory):
    """An old file of ADS, new ones of a capped curve, of corrupted results and of a text that was cut."""
    exp_dir = write_every_defence(tmp_path_factory.mktemp("reader") / "x")
    write_contrast(exp_dir, "a2", "ads", SCORED)
    write_contrast(exp_dir, "a3", "defended", SCORED)
    write_contrast(exp_dir, "a10", "defended", SCORED)
    write_contrast(exp_dir, "a14", "defended", PLAIN, [1])
    write_contrast(exp_dir, "a17", "defended", PLAIN, [])
    return exp_dir


def test_the_reader_has_any_defence_by_its_name(contrasted):
    """It held ADS and its controls, all under the name ADS; a capped curve counted as the one without."""
    found = reader.load_contrasts(collect_points(load_experiments([contrasted])))
    assert [(point["label"], point["score"]) for point in found["points"]] == [
        (f"ADS: {LAM} 6.2, {TAU} 0.4, seed 42", "Delta"),
        (f"ADS: {LAM} 6.2, {TAU} 0.4, KL {AT_MOST} 0.2, seed 42", "Delta"),
        (f"PoE: {LAM} 0.5, {TAU} 2, KL {AT_MOST} 0.1, top-1 kept, seed 42", "score"),
        (f"corrupted results: {LAM} 0.4, {TAU} 0.4, seed 42", "score"),
        (f"truncated: {TAU} 0.4, seed 42", "score"),
    ]
    sides = [point["problems"][0]["defended"] for point in found["points"]]
    assert [side["tokens"] for side in sides] == [SCORED] * 3 + [PLAIN] * 2
    assert [side["replaced"] for side in sides] == [[], [], [], [1], []] and found["first"] == 0


def test_the_page_of_every_defence_names_and_embeds_them(contrasted):
    report.main([str(contrasted)])
    text = (contrasted / "report" / "report.html").read_text(encoding="utf-8")
    assert all(label in text for *_, label in POINTS)
    for entry in page.legend(curves_of(contrasted), []):
        assert entry["key"] in text and entry["key"].count("<path") >= 2
    assert 'class="at-accuracy"' in text and 'class="at-nll"' in text
    assert "max_kl" not in text.partition("<footer>")[0]
    shared = text.partition("</strong>")[2].partition("<main>")[
        0
    ]  # what all arms have, after the names of all models
    assert PROXY not in shared
