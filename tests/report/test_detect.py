"""Whether defended traces can be told from clean ones, where the right answer is known."""

import numpy as np
import pytest
from helpers_attacks import write_training_table
from helpers_report import write_point
from scipy import stats

from ads.report import detect, findings
from ads.report.curves import Point
from ads.report.results import read_row
from ads.report.worst import half_of
from ads.stage import files


def made_up(rng, n=300, shift=0.0):
    """Traces with five features, of which the first is shifted."""
    features_NF = rng.normal(size=(n, 5)) + np.array([shift, 0, 0, 0, 0])
    return detect.Traces(features_NF, np.array([half_of(f"test/{i}") for i in range(n)]))


def auc_of(pairs):
    return detect.measure(Point(read_row({"arm": "ADS", "tau": 0.4, "lam": 8.0}), {}), "", pairs)


def test_traces_alike_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    found = [auc_of([(made_up(rng), made_up(rng))]) for _ in range(40)]
    aucs = np.array([one.auc for one in found])
    assert abs(aucs.mean() - 0.5) < 3 * aucs.std() / np.sqrt(len(aucs))
    # its interval holds .5 about as often as it says, and so does that over seeds
    assert np.mean([one.low <= 0.5 <= one.high for one in found]) >= 0.85
    seeds = auc_of([(made_up(rng), made_up(rng)) for _ in range(4)])
    assert seeds.low <= 0.5 <= seeds.high and seeds.num_seeds == 4 and abs(seeds.auc - 0.5) < 0.05


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_traces_that_have_nothing_in_common_are_told_apart(num_seeds):
    rng = np.random.default_rng(1)
    found = auc_of([(made_up(rng), made_up(rng, shift=20)) for _ in range(num_seeds)])
    assert found.auc == 1 and found.alone == 1 and found.feature == detect.FEATURES[0]
    assert found.high in (1, None)


def test_the_area_is_that_of_the_normal_distribution():
    """A shift by one standard deviation: AUC = Phi(1 / sqrt 2)."""
    rng = np.random.default_rng(2)
    found = auc_of([(made_up(rng, 2000), made_up(rng, 2000, shift=1.0))])
    wanted = stats.norm.cdf(1 / np.sqrt(2))
    assert abs(found.auc - wanted) < 0.02  # a little below: it has four other features to be misled by
    assert 0.02 < found.high - found.low < 0.04


def test_traces_that_are_too_likely_or_too_unlikely_alike_are_told_apart():
    """A defence may move a feature both ways: no line parts these, the features' products do."""
    rng = np.random.default_rng(3)
    wide = made_up(rng, 400)
    wide.features_NF[:, 0] *= 8
    assert auc_of([(made_up(rng, 400), wide)]).auc > 0.85


def test_variance_of_an_area_is_that_of_its_draws():
    rng = np.random.default_rng(4)
    labels_N = np.repeat([False, True], (150, 250))
    drawn = [rng.normal(size=400) + labels_N for _ in range(300)]
    areas = [np.mean(detect.share_below(np.sort(scores[~labels_N]), scores[labels_N])) for scores in drawn]
    assert np.mean([detect.auc_variance(labels_N, scores) for scores in drawn]) == pytest.approx(
        np.var(areas), rel=0.2
    )


def test_what_is_read_of_a_trace():
    loop = "the same twelve words again and again and again until it ends " * 5
    assert detect.features_of("2 + 3 = 5, so 5 * 2 = 11.", 0.25, 20)[:4] == (0.25, False, False, 0.5)
    assert detect.features_of(loop, 0.1, 60)[1:4] == (True, False, 0)
    assert detect.features_of("\u043f\u0440\u0438\u0432\u0435\u0442", 0.1, 3)[2] is True


def test_random_directions_of_a_seed_are_one_seed(tmp_path):
    """A classifier of one direction was tested on another of the same seed, beside the same clean traces."""
    rng = np.random.default_rng(6)
    write_point(tmp_path, "0", 0.4, 0.0, (0.9, 0.8), (0.9, 0.8))
    write_training_table(tmp_path / "traces" / "a0.parquet", rng, n=100)
    for i in (1, 2, 3):
        more = {"direction": "random", "direction_seed": i}
        write_point(tmp_path, str(i), 0.4, 8.0, (0.9, 0.8), (0.9, 0.8), **more)
        write_training_table(tmp_path / "traces" / f"a{i}.parquet", rng, n=100)
    (found,) = findings.gather([tmp_path], None).detections
    assert (found.arm, found.num_seeds, found.num_traces) == ("random direction", 1, 300)


def test_the_clean_ones_are_the_lowest_temperature_of_the_seed(tmp_path):
    """Two seeds: each is judged by a classifier of the other, against its own clean traces."""
    rng = np.random.default_rng(5)
    folders = [tmp_path / "1", tmp_path / "2"]
    for seed, folder in enumerate(folders, 1):
        for i, (tau, lam, wrong) in enumerate(((0.4, 0.0, 0.0), (0.9, 0.0, 0.0), (0.4, 8.0, 0.5))):
            write_point(folder, str(i), tau, lam, (0.9, 0.8), (0.9, 0.8), seed=seed)
            write_training_table(folder / "traces" / f"a{i}.parquet", rng, n=200, wrong=wrong)
    found = {(one.arm, one.tau): one for one in findings.gather(folders, None).detections}
    assert found.keys() == {("temperature", 0.9), ("ADS", 0.4)}  # clean ones are not compared with themselves
    ads = found["ADS", 0.4]
    assert (ads.num_seeds, ads.num_traces, ads.feature) == (2, 400, "sums that do not hold")
    assert ads.auc == pytest.approx(0.75, abs=0.05)  # half of the traces hold a wrong sum
    assert found["temperature", 0.9].low < 0.5 < found["temperature", 0.9].high
    assert detect.cells(list(found.values()))[0][2] == "AUC"
    # where the clean ones cannot be read, no other traces stand in for them
    (folders[0] / "traces" / "a0.parquet").unlink()
    files.write_text(folders[1] / "traces" / "a0.parquet", "")
    assert findings.gather(folders, None).detections == []
