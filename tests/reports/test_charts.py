"""Charts hold every arm and the numbers of the results, for the page and for paper."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxlm.reports import charts as charts_module
from jaxlm.reports.charts import charts, shown_differences, write_figures
from jaxlm.reports.drawing import SERIES, arm_styles, look, short
from jaxlm.reports.quantities import axis_scale, count, power, size
from jaxlm.reports.svg import inline_svg

ALL = ["differences", "curve-bytes", "curve-flops", "curve-seconds", "vocabulary-size", "compression", "units"]


def drawn(results: dict[str, Any], key: str, *, legend: bool = False) -> Figure:
    (chart,) = [chart for chart in charts(results) if chart.key == key]
    with look():
        figure = chart.draw(legend)
        figure.draw_without_rendering()
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def overlap(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of labels that cover one another."""
    found = [(text.get_text(), text.get_window_extent().padded(-0.5)) for axis in figure.axes for text in axis.texts]
    return [(a, b) for (a, first), (b, second) in itertools.combinations(found, 2) if first.overlaps(second)]


def test_all_charts_of_several_arms(make_results: Any) -> None:
    assert [chart.key for chart in charts(make_results())] == ALL


def test_a_family_of_one_size_has_no_chart_of_sizes(make_results: Any) -> None:
    assert [chart.key for chart in charts(make_results(sizes=(500,)))] == [k for k in ALL if k != "vocabulary-size"]


def test_no_arm_no_chart(make_results: Any, tmp_path: Path) -> None:
    results = make_results()
    for arm in results["arms"]:
        arm["status"] = "failed"
    assert charts(results) == []
    assert write_figures(results, tmp_path / "figures") == []


def test_curves_are_means_with_a_band_over_seeds(make_results: Any) -> None:
    results = make_results(seeds=(0, 1))
    (axis,) = drawn(results, "curve-bytes").axes
    lines = [line for line in results["evaluations"] if line["arm"] == "char"]
    expected: dict[float, list[float]] = {}
    for line in lines:
        expected.setdefault(line["bytes"] / 1e6, []).append(line["bits_per_byte"])
    points = axis.lines[0].get_xydata()
    np.testing.assert_allclose(points[:, 0], list(expected))
    np.testing.assert_allclose(points[:, 1], [np.mean(scores) for scores in expected.values()])
    assert len(axis.lines) == len(axis.collections) == 3
    band = axis.collections[0].get_paths()[0].vertices
    for x, scores in expected.items():
        heights = band[np.isclose(band[:, 0], x), 1]
        np.testing.assert_allclose([heights.min(), heights.max()], [min(scores), max(scores)])


def test_one_seed_has_no_band_and_lost_evaluations_are_left_out(make_results: Any) -> None:
    results = make_results(seeds=(0,))
    results["evaluations"][3]["bits_per_byte"] = None
    results["evaluations"].append({**results["evaluations"][4], "final": True, "bits_per_byte": 9.0})
    (axis,) = drawn(results, "curve-seconds").axes
    assert not axis.collections
    assert len(axis.lines[0].get_xdata()) == 11
    assert axis.lines[0].get_ydata()[3] == results["evaluations"][4]["bits_per_byte"]


def test_an_arm_with_a_final_evaluation_alone_is_a_point(make_results: Any) -> None:
    results = make_results(seeds=(0,))
    others = [line for line in results["evaluations"] if line["arm"] != "char"]
    results["evaluations"] = [{**results["evaluations"][11], "final": True}, *others]
    (axis,) = drawn(results, "curve-bytes").axes
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [1.8])


def test_labels_keep_off_one_another(make_results: Any) -> None:
    results = make_results(sizes=(300, 320, 340, 360, 500))
    figure = drawn(results, "compression")
    assert sorted(texts(figure)) == sorted(arm["name"] for arm in results["arms"])
    assert not overlap(figure)
    assert not overlap(drawn(results, "vocabulary-size"))


def test_many_arms(make_results: Any, tmp_path: Path) -> None:
    results = make_results(sizes=(300, 500))
    template = results["arms"][1]
    for number in range(40):
        score = 2.4 + 0.003 * number
        results["arms"].append({
            **template, "name": f"bpe-x{number}", "vocab_size": 301 + number, "bits_per_byte": score,
            "family": f"family {number % 4}", "low": score - 0.01, "high": score + 0.01,
        })  # fmt: skip
    assert not overlap(drawn(results, "compression"))
    assert len(drawn(results, "compression", legend=True).legends[0].get_texts()) == 43
    looks = [(style.colour, style.marker) for style in arm_styles(results).values()]
    assert len(set(looks)) == len(looks) == 43, "two arms look the same"
    assert len(write_figures(results, tmp_path)) == 7


def test_few_arms_have_a_colour_each(make_results: Any) -> None:
    results = make_results(sizes=(300, 320, 340, 360, 500))
    assert len({style.colour for style in arm_styles(results).values()}) == 6


def test_a_family_has_one_colour_where_colours_are_few(make_results: Any) -> None:
    results = make_results()
    results["arms"] = [{**results["arms"][0], "name": str(n), "family": f"family {n % 2}"} for n in range(16)]
    styles = arm_styles(results)
    assert {style.colour for style in styles.values()} == {0, 1}
    assert styles["0"].colour == styles["2"].colour != styles["1"].colour
    assert len({(style.colour, style.marker) for style in styles.values()}) == 16


def test_differences_to_the_first_arm(make_results: Any) -> None:
    results = make_results(sizes=(300, 320, 340, 500))
    assert len(results["differences"]) == 10
    rows = shown_differences(results)
    assert [row["b"] for row in rows] == ["char"] * 4
    original = results["differences"][0]
    assert (original["a"], original["b"]) == ("char", "bpe-300")
    assert rows[0]["difference"] == -original["difference"]
    assert (rows[0]["low"], rows[0]["high"]) == (-original["high"], -original["low"])
    assert rows[0]["low"] < rows[0]["difference"] < rows[0]["high"]
    assert rows[0]["verdict"] == "a lower"
    assert rows[0]["verdict_text"] == "bpe-300 lower"


def test_forest_shows_what_is_shown(make_results: Any) -> None:
    results = make_results()
    results["differences"][0] |= {"verdict": "no difference shown", "difference": 0.001, "low": -0.02, "high": 0.022}
    (axis,) = drawn(results, "differences").axes
    points = axis.lines[:3]
    assert [point.get_xdata()[0] for point in points] == [row["difference"] for row in results["differences"]]
    faces = [point.get_markerfacecolor() for point in points]
    assert faces[0] != SERIES[0] == faces[1]
    assert len(axis.collections) == 3
    left, right = axis.get_xlim()
    assert left < 0 < right


def test_forest_of_one_seed_has_no_intervals(make_results: Any) -> None:
    (axis,) = drawn(make_results(seeds=(0,)), "differences").axes
    assert not axis.collections
    assert "one seed: not judged" in charts(make_results(seeds=(0,)))[0].alternative


def test_alternatives_tell_the_numbers(make_results: Any) -> None:
    results = make_results()
    for chart in charts(results):
        if chart.key == "differences":
            assert f"{results['differences'][0]['difference']:+.4f}" in chart.alternative
        elif not chart.key.startswith("curve"):
            for arm in results["arms"]:
                assert f"{arm['bits_per_byte']:.3f}" in chart.alternative
        assert chart.caption


def test_svg_is_fit_for_a_page(make_results: Any) -> None:
    results = make_results()
    seen: set[str] = set()
    for chart in charts(results):
        text = inline_svg(chart)
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img"
        assert [child.tag for child in root][:2] == ["title", "desc"]
        assert root[1].text == chart.alternative
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
        references = {match[1] for match in re.finditer(r'(?:href="|url\()#([^")]+)', text)}
        assert references <= set(ids)
        assert "http" not in text
        assert "metadata" not in text
        assert not re.search(r"#[0-9a-f]{6}", re.sub(r'(?:href="|url\(|id=")[^")]+', "", text)), (
            "a colour that ignores the dark"
        )
        sizes = [float(match) for match in re.findall(r"font-size: ([\d.]+)px", text)]
        assert min(sizes) >= 10
        width = float(root.get("viewBox", "").split()[2])
        assert width <= 360, "scaled to a phone the letters would shrink"
        assert inline_svg(chart) == text, "the same chart is drawn in another way the next time"


def test_parts_of_an_arm_can_be_found(make_results: Any) -> None:
    results = make_results()
    for chart in charts(results):
        if chart.key.startswith("curve") or chart.key in ("compression", "vocabulary-size"):
            assert set(re.findall(r'data-arm="(\d+)"', inline_svg(chart))) == {"0", "1", "2"}


@pytest.mark.parametrize(
    "name", ['<script>"x"</script>', "$\\frac$", '#0072b2 id="a" url(#b)', "a\x00\x1b\ud800", "é☃𝄞" * 30]
)
def test_a_name_is_text(make_results: Any, name: str) -> None:
    results = make_results(sizes=(300, 500))
    results["arms"][0]["name"] = results["arms"][0]["family"] = name
    for row in results["differences"]:
        row |= {key: name for key in ("a", "b") if row[key] == "char"}
    for line in results["evaluations"]:
        line["arm"] = name if line["arm"] == "char" else line["arm"]
    for chart in charts(results):
        text = inline_svg(chart).replace("\x00", "").replace("\x1b", "").encode("utf-8", "backslashreplace").decode()
        root = ElementTree.fromstring(text)
        words = {"".join(element.itertext()) for element in root.iter() if element.tag == "text"}
        assert not any(element.tag.endswith("script") for element in root.iter())
        if chart.key == "units":
            assert short(name, 20) in words


def test_figures_for_paper(make_results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_figures(make_results(), tmp_path / "new" / "figures")
    assert [path.stem for path in paths] == ALL
    assert sorted(path.name for path in (tmp_path / "new" / "figures").iterdir()) == sorted(f"{key}.png" for key in ALL)
    for path in paths:
        image = plt.imread(path)
        assert image.shape[1] == 1000
        np.testing.assert_allclose(image[0, 0, :3], 1)
        assert len(np.unique(image[..., 0])) > 10, "the figure is blank"

    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        charts_module.write_figures(make_results(), tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_legend_on_paper_names_all(make_results: Any) -> None:
    figure = drawn(make_results(), "curve-bytes", legend=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["char", "bpe-300", "bpe-500"]
    assert not drawn(make_results(), "curve-bytes").legends


def test_quantities() -> None:
    assert [power(x) for x in (0, 0.001, 3e-4, 999.9, 12_345, 4.6e12, 9.999e15)] == [
        "0", "0.001", "3.00 × 10⁻⁴", "1,000", "12,345", "4.60 × 10¹²", "1.00 × 10¹⁶",
    ]  # fmt: skip
    assert [size(x) for x in (12, 999.6e3, 1.8e6, 34_210)] == ["12 B", "1,000 kB", "1.8 MB", "34.2 kB"]
    assert [count(x) for x in (9_999, 10_000, 861_432, 1.752e6)] == ["9,999", "10 k", "861 k", "1.75 M"]
    assert axis_scale("bytes", 1.8e6) == (1e6, "source bytes seen (MB)")
    assert axis_scale("seconds", 100) == (1.0, "training time (seconds)")
    assert axis_scale("seconds", 300) == (60.0, "training time (minutes)")
    assert axis_scale("flops", 0) == (1.0, "training FLOPs (× 10⁰)")
