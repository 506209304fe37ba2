"""The report of a run directory: plots, predictions, printed tables."""

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from sample_run import CONFIG, make_run, softmax

from sead_dist.data.metrics import confusion
from sead_dist.errors import UserError
from sead_dist.reporting.plots import (
    draft,
    even_records,
    plot_calibration,
    plot_confusion,
    plot_scores,
    reliability,
    save,
)
from sead_dist.reporting.report import read_predictions, write_predictions, write_report
from sead_dist.runtime.console import print_table
from sead_dist.runtime.run_log import write_json

pytestmark = pytest.mark.usefixtures("whole_pictures")


def sizes(run):
    found = {}
    for path in (run / "plots").iterdir():
        with Image.open(path) as image:
            image.load()
            found[path.name] = image.size
            assert len(image.convert("L").getcolors(maxcolors=256)) > 10, f"{path.name} is blank"
    return found


def test_the_same_files_give_the_same_card_and_a_copy_beside_the_model(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "model").mkdir()
    write_report(run)
    first = (run / "README.md").read_text()
    write_report(run)
    assert (run / "README.md").read_text() == first
    assert (run / "model" / "README.md").read_text() == first
    for name in ("loss.png", "scores.png", "calibration.png"):
        assert f"](plots/{name})" in first
        copied = (run / "model" / "plots" / name).read_bytes()
        assert copied == (run / "plots" / name).read_bytes()


def test_the_plots_open_and_have_a_sane_size(tmp_path):
    run = make_run(tmp_path / "run")
    write_report(run)
    found = sizes(run)
    assert set(found) == {"loss.png", "scores.png", "calibration.png"}
    for width, height in found.values():
        assert 600 <= width <= 2000
        assert 250 <= height <= 2000


@pytest.mark.parametrize("draw", [lambda figure, _: draft(figure), save])
def test_a_draft_fails_where_the_picture_would(draw, tmp_path):
    """What is tried before a run's first step is what its report ends with."""
    no_formula = r"$\frac{$"
    found = reliability(np.array([[0.7, 0.3]]), np.array([0]))
    matrix = confusion(["a", "b"], np.array([0]), np.array([[0.7, 0.3]]))
    for figure in (
        plot_scores({no_formula: [("teacher", "a", 0.5)]}, "accuracy"),
        plot_scores({"validation": [("teacher", "a", 0.5)]}, no_formula),
        plot_calibration({"student": found}, no_formula),
        plot_confusion(matrix, no_formula),
    ):
        with pytest.raises(ValueError, match="frac"):
            draw(figure, tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_teachers(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("teacher_validation.json", "teacher_manifest.json"):
        (run / name).unlink()
    write_json(
        run / "scores.json",
        {
            "metric": "accuracy",
            "splits": {"validation": {"student": {"accuracy": 0.9}, "ensemble": None}},
            "selected_on": "held_out",
        },
    )
    predictions = read_predictions(run / "predictions" / "validation.parquet")
    write_predictions(
        run / "predictions" / "validation.parquet",
        predictions.ids_B2,
        predictions.labels_B,
        predictions.student_logits_BC,
        None,
    )
    (run / "metrics.jsonl").write_text(
        '{"event": "train", "step": 1, "loss": 0.7, "loss_soft": null, "loss_hard": 0.7}\n{"event'
    )
    write_report(run)
    card = ModelCard.load(run / "README.md")
    assert card.data.tags == ["sst2"]
    assert "without teachers" in " ".join(card.text.split())
    assert "| ensemble |" not in card.text
    assert set(sizes(run)) == {"loss.png", "scores.png", "calibration.png"}


def test_a_regression_run_has_a_scatter_and_no_calibration_error(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "task": "stsb"}))
    scores = {"pearson": 0.8962, "spearmanr": 0.8978}
    split = {"teachers": [], "ensemble": {**scores, "pearson": -0.1}, "student": scores}
    write_json(
        run / "scores.json",
        {"metric": "pearson", "splits": {"validation": split}, "selected_on": "held_out"},
    )
    write_json(run / "eval_results.json", {"eval_pearson": 0.8962, "eval_samples": 1500})
    generator = np.random.default_rng(2)
    gold_B = generator.uniform(0, 5, 300)
    gold_B[0] = np.nan  # unlabelled
    noise_B1 = generator.normal(size=(300, 1)) * 0.5
    written = np.nan_to_num(gold_B)[:, None] + noise_B1
    write_predictions(
        run / "predictions" / "validation.parquet",
        np.arange(600).reshape(300, 2),
        gold_B,
        written,
        written * 0.9,
    )
    write_report(run)
    card = ModelCard.load(run / "README.md")
    assert [r.metric_type for r in card.data.eval_results] == ["pearsonr", "spearmanr"]
    assert "calibration error" not in card.text
    assert "Predicted against gold" in card.text
    assert '"text_pair"' in card.text
    assert set(sizes(run)) == {"loss.png", "scores.png", "calibration.png"}


def test_a_missing_file_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "scores.json").unlink()
    with pytest.raises(UserError, match=r"scores\.json is missing"):
        write_report(run)


def test_calibration_error_worked_out_by_hand():
    # Bin (0.6, 0.7]: 0.7 right. Bin (0.7, 0.8]: 0.8 wrong, 0.75 right: mean 0.775, accuracy 0.5.
    # Bin (0.9, 1.0]: 1.0 right. Error: (1 * 0.3 + 2 * 0.275 + 1 * 0) / 4 = 0.2125.
    probabilities_BC = np.array([[0.7, 0.3], [0.2, 0.8], [0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    result = reliability(probabilities_BC, np.array([0, 0, 1, 0, -1]))
    assert result.error == pytest.approx(0.2125)
    assert result.count_K.tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 0, 1]
    assert result.accuracy_K[7] == 0.5
    assert np.isnan(result.accuracy_K[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_come_back_with_the_same_bits(tmp_path, dtype):
    generator = np.random.default_rng(3)
    ids_B2 = np.array([[-1, 0], [2**63 - 1, -(2**63)], [5, 6]])
    labels_B, logits_BC = np.array([0, -1, 2]), generator.normal(size=(3, 3)).astype(dtype)
    path = tmp_path / "predictions" / "validation.parquet"
    write_predictions(path, ids_B2, labels_B, logits_BC, softmax(logits_BC))
    read = read_predictions(path)
    assert np.array_equal(read.ids_B2, ids_B2)
    assert np.array_equal(read.labels_B, labels_B)
    assert read.student_logits_BC.dtype == dtype
    assert np.array_equal(read.student_logits_BC, logits_BC)
    assert np.array_equal(read.ensemble_probabilities_BC, softmax(logits_BC))
    write_predictions(path, ids_B2, labels_B, logits_BC, None)
    assert read_predictions(path).ensemble_probabilities_BC is None
    assert [p.name for p in path.parent.iterdir()] == ["validation.parquet"]


@pytest.mark.parametrize("content", [None, b"", b"not parquet"])
def test_predictions_that_cannot_be_read_are_named(tmp_path, content):
    path = tmp_path / "validation.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"validation\.parquet cannot be read"):
        read_predictions(path)


def test_a_printed_table_is_not_cut_where_there_is_no_terminal(capsys):
    print_table("Scores", ["model", "accuracy"], [["x" * 100, 0.92661], ["[red]", None]])
    out = capsys.readouterr().out
    assert "x" * 100 in out
    assert "0.9266" in out
    assert "[red]" in out


def test_a_record_of_few_rows_makes_no_cliff_in_the_loss_curve():
    full = [{"event": "train", "step": 10 * n, "rows": 320, "loss": 1.0} for n in (1, 2, 3)]
    cut = {"event": "train", "step": 31, "rows": 4, "loss": 9.0, "loss_soft": None}
    seen = even_records([*full, cut])
    assert [record["step"] for record in seen] == [10, 20, 31]
    assert seen[-1]["loss"] == pytest.approx((320 * 1.0 + 4 * 9.0) / 324)
    # in the middle a short one joins the next
    seen = even_records([full[0], {**cut, "step": 11}, full[1], full[2]])
    assert [record["step"] for record in seen] == [10, 20, 30]
    assert even_records([cut]) == [cut]
    old = [{key: value for key, value in record.items() if key != "rows"} for record in full]
    assert even_records(old) == old
