"""A grid file as rows of arguments, and the runs of a sweep as a table."""

from pathlib import Path

import pytest

from clipkd.sweep import read_grid, tabulate


def write(path: Path, text: str) -> Path:
    (path / "grid.yaml").write_text(text, encoding="utf-8")
    return path / "grid.yaml"


def test_a_row_stands_for_every_value_that_it_names(tmp_path: Path) -> None:
    text = """
base: --config tiny --data.path 'a b'
values: {gamma: [0, 0.3], queue: [4]}
rows:
  alone:
  GKL {gamma}: --objective.gkl.weight 1 --objective.gkl.gamma {gamma}
  queue {queue}, {gamma}: --objective.queue {queue} --objective.gkl.gamma {gamma}
"""
    base = ["--config", "tiny", "--data.path", "a b"]
    gkl = [*base, "--objective.gkl.weight", "1", "--objective.gkl.gamma"]
    assert read_grid(write(tmp_path, text)) == {
        "alone": base,
        "GKL 0": [*gkl, "0"],
        "GKL 0.3": [*gkl, "0.3"],
        "queue 4, 0": [*base, "--objective.queue", "4", "--objective.gkl.gamma", "0"],
        "queue 4, 0.3": [*base, "--objective.queue", "4", "--objective.gkl.gamma", "0.3"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [a]", "rows is not as it should be"),
        ("base: x", "rows is not as it should be"),
        ("row: {a: b}", "row is not as it should be"),
        ("[a]", "it is not as it should be"),
        ("", "it is not as it should be"),
        ("rows: {'a {x}': b}", "row 'a {x}' names {x}, but values has no list of that name"),
        ("values: {x: 1}\nrows: {'a {x}': b}", "values has no list of that name"),
        ("rows: {a: b", "cannot be read: "),
        ("rows: {a: '--x {g}'}", "row 'a' names {g}, but values has no list of that name"),
        ("values: {g: []}\nrows: {'a {g}': b}", "values has no list of that name"),
        ("values: {g: [1, 1]}\nrows: {'a {g}': b}", "two rows are named 'a 1'"),
        ("rows: {a: [--x, 1]}", "row 'a': write its options as on the command line, in one string"),
        ("1: x", "1 is not as it should be"),
        ("rows: {a: '--x \"'}", "row 'a': No closing quotation"),
        ("rows: {a: --seed 3}", "row 'a' sets ['--seed']; a sweep sets seed, output and resume itself"),
    ],
)
def test_a_wrong_grid_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"grid\.yaml") as error:
        read_grid(write(tmp_path, text))
    assert message in str(error.value)


def test_the_table_has_mean_deviation_and_paired_differences_by_hand() -> None:
    """Differences at equal seeds: 3, 1 and 5 points, mean 3, deviation 2, standard error 2 / √3."""

    def run(row: str, seed: int, value: float) -> dict[str, object]:
        metrics = {"pets": {"acc1": None, "recall": value / 100, "n": 9, "main": "recall"}}
        return {"row": row, "seed": seed, "step": 5, "seconds": 2.0 + seed, "metrics": metrics}

    rows = [run("alone", 0, 10), run("alone", 1, 20), run("alone", 2, 30), run("kd", 0, 13), run("kd", 1, 21)]
    rows += [run("kd", 2, 35), run("o|ne", 4, 7)]
    assert tabulate(rows).splitlines() == [
        "| row | seeds | steps | seconds | pets recall | − alone |",
        "|---|---:|---:|---:|---:|---:|",
        "| alone | 3 | 5 | 3 | 20.00 ± 10.00 |  |",
        "| kd | 3 | 5 | 3 | 23.00 ± 11.14 | +3.00 ± 1.15 |",
        "| o∣ne | 1 | 5 | 6 | 7.00 |  |",
    ]
