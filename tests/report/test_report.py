"""The HTML page about a run: its content, that it is well-formed, and that it loads nothing."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from clipkd import files
from clipkd.config.train import TrainConfig, to_dict
from clipkd.report import ReportConfig, write_report
from clipkd.report.evaluation import in_proportion
from clipkd.report.figures import group_terms, running_mean, thin

TERMS = {"info_nce": 1.5, "gkl": 2.0, "gkl_wmse": 5.0, "gkl_kl": 0.75, "gkl_soft_ce": 1.25, "gkl_teacher_entropy": 0.5}
SVG = "{http://www.w3.org/2000/svg}"


def metrics(step: int, **values: Any) -> dict[str, Any]:
    base = {"step": step, "epoch": None, "world_size": 2, "loss": 4.0 / step, "logit_scale": 14.0, "grad_norm": 2.5}
    rates = {"lr": 1e-3, "images_per_second": 100.0 * step, "data_wait": 0.25, "seconds": 3700.0 + step}
    return base | rates | values


def result(step: int, top1: float, *, weights: str = "student", key: str = "birds") -> dict[str, Any]:
    scores = {"acc1": top1, "acc5": min(1, 2 * top1), "mean_per_class_recall": top1 / 2, "main_metric": top1}
    return {"step": step, "key": key, "dataset": key, "weights": weights, "metrics": scores, "n": 1337}


def write_run(folder: Path, rows: list[dict[str, Any]], **logs: list[dict[str, Any]]) -> Path:
    for name, lines in {"metrics": rows, **logs}.items():
        for line in lines:
            files.append_row(folder / f"{name}.jsonl", line)
    return folder


def report(folder: Path) -> str:
    return write_report(ReportConfig(run=str(folder))).read_text(encoding="utf-8")


def parse(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def text(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def facts(page: str) -> dict[str, str]:
    return {text(cell[0]): text(cell[1]) for cell in parse(page).findall(".//dl/div")}


def panels(page: str) -> dict[str, list[str]]:
    """Title of every figure → its legend."""
    return {text(f.find(".//h3")): [text(line) for line in f.iter("li")] for f in parse(page).iter("figure")}


def tables(page: str) -> list[list[list[str]]]:
    return [[[text(cell) for cell in row] for row in table] for table in parse(page).iter("table")]


def table(page: str, corner: str) -> list[list[str]]:
    """Rows below the header of the table whose first header is `corner`."""
    return next(rows[1:] for rows in tables(page) if rows[0][0] == corner)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three logged steps with every file there is."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    rows = [metrics(step, **TERMS, skipped=step) for step in (1, 2)]
    rows.append(metrics(4, **TERMS | {"gkl_kl": 0.5}, skipped=5))
    evaluations = [result(2, 0.5), result(4, 0.25), result(2, 0.125, weights="ema"), result(4, 0.75, weights="ema")]
    image, caption = "image cannot be decoded", "empty caption"
    cut = {"key": "0001.tar/12", "cause": image, "message": "cut"}
    found = [
        {"step": 0, "counts": {image: 7}, "examples": []},
        {"step": 2, "counts": {image: 2, caption: 1}, "examples": [cut]},
        {
            "step": 4,
            "counts": {caption: 2},
            "examples": [cut | {"key": f"k{i}", "cause": caption, "message": ""} for i in range(5)],
        },
    ]
    write_run(folder, rows, results=evaluations, skipped=found)
    options = to_dict(TrainConfig()) | {"steps": 4000, "batch_size": 64}
    options["teacher"]["models"], options["data"]["path"] = "ViT-L-14", ["a.tar", "b.tar"]
    (folder / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    for step in (2, 4):
        (folder / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def page(full: Path) -> str:
    return report(full)


def test_facts_are_those_of_the_last_line_and_medians(page: str) -> None:
    assert facts(page) == {
        "student": "ViT-T-16",
        "teacher": "ViT-L-14",
        "training data": "a.tar\nb.tar",
        "steps": "4 of 4,000",
        "batch size, processes": "64, 2",
        "training time (h:min:s)": "1:01:44",
        "images per second, median": "200",
        "waiting for data, median": "25.00%",
        "samples skipped": "5 while training, 7 at indexing",
        "newest checkpoint": "step_000004",
        "last top-1": "birds (student) 25.00%\nbirds (ema) 75.00%",
    }


def test_the_tables_by_hand(full: Path, page: str) -> None:
    assert table(page, "data set") == [
        ["birds", "student", "4", "25.00%", "50.00%", "12.50%", "1,337", "50.00% at step 2"],
        ["birds", "ema", "4", "75.00%", "100.00%", "37.50%", "1,337", "75.00% at step 4"],
    ]
    assert table(page, "cause") == [
        ["image cannot be decoded", "2", "7", "0001.tar/12: cut"],
        ["empty caption", "3", "0", "k0: \nk1: \nk2: "],  # three examples are enough
    ]
    changed = [["steps", "4000", "10000"], ["batch_size", "64", "256"], ["teacher.models", "ViT-L-14", "[]"]]
    assert table(page, "option") == [*changed, ["data.path", '["a.tar", "b.tar"]', '""']]
    assert text(parse(page).find(".//details/pre")) == (full / "config.yaml").read_text()


def test_curves_stand_in_panels_of_their_term_with_their_last_value(page: str) -> None:
    found = panels(page)
    assert found["loss"] == ["loss 1"]
    assert found["gkl: divergence"] == ["gkl_kl 0.5", "gkl_soft_ce 1.25", "gkl_teacher_entropy 0.5"]
    assert found["gkl: value, other parts"] == ["gkl 2", "gkl_wmse 5"]
    assert found["top-1 accuracy"] == ["birds (student) 25.00%", "birds (ema) 75.00%"]


def test_every_figure_is_drawn_with_axis_labels_and_ids_of_its_own(page: str) -> None:
    words = [[text(word) for word in drawing.iter(SVG + "text")] for drawing in parse(page).iter(SVG + "svg")]
    assert len(words) == 11
    assert all("step" in labels for labels in words)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_the_page_loads_nothing_and_depends_on_the_files_only(full: Path, page: str, tmp_path: Path) -> None:
    assert not re.findall(r"<(?:script|img|link|iframe|object|embed|image)\b|\bsrc=|@import", page)
    targets = ["".join(found) for found in re.findall(r'href="([^"]*)|url\(([^)]*)', page)]
    assert all(target.startswith("#") for target in targets if target)
    assert set(re.findall(r"https?://[^/]+", page)) == {"http://www.w3.org"}  # names of name spaces
    again = write_report(ReportConfig(run=str(full), output=str(tmp_path / "deep/b.html")))
    assert again == tmp_path / "deep/b.html"
    assert again.read_text(encoding="utf-8") == page


def test_markup_in_any_file_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    evil, odd = "<script>alert(1)</script>", "$x_{\ud800\u0000&]]>"
    run = tmp_path / "<b>&amp;"
    row = metrics(1, **{evil: 1.0, odd: 2.0, f"{evil}_logit_scale": 3.0})
    example = {"key": evil, "cause": evil, "message": odd}
    evaluations = [result(1, 0.5, key=evil), result(2, 0.5, key=evil, weights=odd)]
    write_run(run, [row], results=evaluations, skipped=[{"step": 1, "counts": {evil: 1}, "examples": [example]}])
    (run / "config.yaml").write_text(yaml.safe_dump({"student": {"model": evil}, evil: evil}))
    (run / "nonfinite_step_1.json").write_text(json.dumps({"step": 1, "loss": evil, "keys": [evil, odd]}))
    page = report(run)
    assert "<script" not in page
    assert "<b>&amp;" not in page
    assert panels(page)[evil] == [f"{evil} 1"]
    assert panels(page)["$x_{\ufffd\ufffd&]]>"] == ["$x_{\ufffd\ufffd&]]> 2"]
    assert table(page, "cause")[0][0] == evil
    assert ["student.model", evil, "ViT-T-16"] in table(page, "option")
    assert [evil, evil, "no such option"] in table(page, "option")
    assert facts(page)["student"] == evil


def test_one_line_and_no_other_file_is_enough_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, [metrics(1)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 17')
    page = report(run)
    assert panels(page)["loss"] == ["loss 4"]
    assert facts(page)["steps"] == "1"
    assert facts(page)["student"] == "–"
    assert "No evaluation yet." in page
    assert "None recorded." in page
    assert "No readable config.yaml." in page


def test_nulls_are_gaps_that_are_counted(tmp_path: Path) -> None:
    extremes = {"zero": 0.0, "negative": -3.0, "tiny": 5e-324, "huge": 1e300, "note": "words are no curve"}
    rows = [metrics(step, loss=None, kl=math.nan if step == 3 else step, **extremes) for step in range(1, 6)]
    page = report(write_run(tmp_path, rows))
    assert panels(page)["loss"] == ["loss –"]
    assert panels(page)["kl"] == ["kl 5"]
    assert {"zero", "negative", "tiny", "huge"} == extremes.keys() & panels(page).keys()
    assert "5 of 5 values of loss are not finite" in page
    assert "1 of 5 values of kl are not finite" in page
    assert page.count("<svg") == len(panels(page)) - 1


@pytest.mark.parametrize(("last", "continued"), [(7, False), (9, True)])
def test_a_stop_on_a_non_finite_loss_stands_on_top(tmp_path: Path, last: int, continued: bool) -> None:
    run = write_run(tmp_path, [metrics(last)])
    (run / "nonfinite_step_8.json").write_text('{"step": 8, "loss": NaN, "grad_norm": null, "keys": ["a.tar/1"]}')
    (run / "nonfinite_step_3000.json").write_text('{"step": 3000, "lo')
    page = report(run)
    banners = [text(p) for p in parse(page).iter("p") if p.get("class") == "banner"]
    assert len(banners) == 2
    banner = next(banner for banner in banners if banner.startswith("Stopped at step 8: the loss was not finite"))
    assert "a.tar/1" in banner
    assert ("The run was continued to step 9" in banner) == continued
    assert any(banner.startswith("Stopped at step 3,000") for banner in banners)


def test_series_belong_to_the_longest_active_term() -> None:
    names = ["kl", "kl_soft_ce", "soft_ce", "soft_ce_kl", "info_nce", "vrd_info_nce", "itc_target_entropy", "itc_new"]
    expected = {"kl": names[:2], "soft_ce": names[2:4], "info_nce": names[4:5], "vrd": names[5:6]}
    assert group_terms(names, []) == expected | {"itc": ["itc_target_entropy"], "itc_new": ["itc_new"]}
    assert group_terms(names, ["itc", "kl", "soft_ce"]) == expected | {"itc": ["itc_target_entropy", "itc_new"]}


def test_running_mean_by_hand() -> None:
    values = np.array([1.0, 2.0, 6.0, math.nan, 10.0])
    np.testing.assert_allclose(running_mean(values, 3), [1.5, 3.0, 4.0, math.nan, 10.0])


def test_a_long_curve_is_thinned_without_losing_a_spike() -> None:
    values = np.sin(np.arange(100_000))
    values[77_777], values[1_000:9_000] = -50.0, math.nan
    kept = thin(values)
    assert len(kept) <= 1500
    assert 77_777 in kept
    assert np.isnan(values[kept]).any()
    assert np.all(np.diff(kept) > 0)


def test_a_few_answers_keep_the_proportion_of_right_ones() -> None:
    correct = [place % 4 == 0 for place in range(100)]
    places = in_proportion(correct, 12)
    assert len(set(places)) == 12
    assert [correct[place] for place in places].count(True) == 3
    assert places == sorted(places)
    assert places[-1] >= 80  # spread over all
    assert in_proportion([True, False], 12) == [0, 1]
    assert in_proportion([], 12) == []


def test_missing_input_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no run folder .*absent; name the output of a clipkd train"):
        report(tmp_path / "absent")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss"')
    with pytest.raises(ValueError, match=r"no complete line yet"):
        report(tmp_path)
    with pytest.raises(ValueError, match=r"is a folder; name an HTML file with --output"):
        write_report(ReportConfig(run=str(write_run(tmp_path / "run", [metrics(1)])), output=str(tmp_path)))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'clipkd\[report\]'"):
        report(tmp_path / "run")


def evaluated(model: str, task: str, top1: float, **more: Any) -> dict[str, Any]:
    bins = {"counts": [1, 2], "confidences": [0.2, 0.7], "accuracies": [0.1, None], "ece": 0.25}
    cost = {name: {"image": top1 * 1e6, "text": 5e5} for name in ("parameters", "macs", "latency_ms")}
    row = {"model": model, "key": task, "weights": "student", "metrics": {"acc1": top1, "main_metric": top1}, "n": 4}
    row |= {"id": f"{model} {task}", "model_sha256": model, "precision": "fp32"}
    row |= {"ci95": {"main_metric": [top1 / 2, 0.9]}, "main_metric_name": "acc1", "chance": 0.01, "calibration": bins}
    return row | {"cost": {**cost, "device": "cpu, 2 threads"}, "samples": f"samples/{model}-{task}.parquet"} | more


def test_results_of_eval_are_shown_alone_or_beside_a_run(full: Path, tmp_path: Path) -> None:
    lost = [{"class": 1, "name": "wren <small>", "recall": 0.0, "teacher_recall": 0.75}]
    beside: dict[str, Any] = {"model": "big", "model_sha256": "big", "lost_classes": lost}
    beside |= {"retained": 0.5, "agreement": 0.25, "kl": 1.5}
    small = evaluated("small", "birds", 0.25, teacher=beside, task_options={}, data="gone")
    for row in (evaluated("big", "birds", 0.5), small):
        files.append_row(tmp_path / "results" / "eval_results.jsonl", row)
    page = report(tmp_path / "results")
    scores = {row[1]: row for row in table(page, "task")}
    assert scores["small"][3:9] == ["25.00%", "12.50 to 90.00", "1.00%", "4", "50.00%", "25.00%"]
    assert scores["big"][7] == "–"
    assert ["birds", "small", "wren <small>", "0.00%", "75.00%"] in [row[:5] for t in tables(page) for row in t]
    shown = panels(page)
    assert shown["parameters of both towers"] == ["big 50.00% at 1", "small 25.00% at 0.75"]
    assert shown["birds"] == ["big ECE 25.00%", "small ECE 25.00%"]
    assert "No pictures: " in page
    both = write_report(
        ReportConfig(run=str(full), results=str(tmp_path / "results"), output=str(tmp_path / "both.html"))
    )
    assert {"loss", "birds"} <= panels(both.read_text(encoding="utf-8")).keys()
    with pytest.raises(ValueError, match="holds no results"):
        write_report(ReportConfig(run=str(full), results=str(tmp_path)))
