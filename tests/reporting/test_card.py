"""The model card of a run directory."""

import pytest
import yaml
from huggingface_hub import ModelCard
from sample_run import CONFIG, RESULTS, change, make_predictions, make_run

from sead_dist.reporting.report import write_report
from sead_dist.runtime.run_log import write_json


def cells(card, first):
    """The cells of the first table line that begins with `first`."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_card_loads_with_its_metadata_and_model_index(tmp_path):
    run = make_run(tmp_path / "run")
    write_report(run)
    data = ModelCard.load(run / "README.md").data
    assert data.to_dict()["library_name"] == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["knowledge-distillation", "mean_probabilities", "sst2"]
    assert data.datasets == ["nyu-mll/glue"]
    assert data.base_model == "microsoft/xtremedistil-l6-h256-uncased"
    assert data.metrics == ["accuracy"]
    (result,) = data.eval_results
    assert result.metric_value == 0.9266
    assert (result.dataset_config, result.dataset_split) == ("sst2", "validation")


def test_the_tables_hold_the_numbers_of_the_files(tmp_path):
    run = make_run(tmp_path / "run")
    write_report(run)
    card = (run / "README.md").read_text()
    header = cells(card, "eval_accuracy")
    lines = card.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("| eval_accuracy"))
    values = [cell.strip() for cell in lines[at + 2].strip("|").split("|")]
    assert {k: float(v) for k, v in zip(header, values, strict=True)} == RESULTS
    assert cells(card, "student") == ["student", "0.9266"]
    assert cells(card, "ensemble") == ["ensemble", "0.9346"]
    assert cells(card, "teacher-0") == ["teacher-0", "0.9312"]
    assert "0.9412" in card.split("### selection")[1].split("###")[0]
    taught = next(line for line in lines if "`1a1a1a1a1a1a1a1a`" in line)
    assert "org/teacher@abcdef012345" in taught
    assert "0.9289" in taught
    assert "0.5579" in taught
    assert "134698" in card
    assert "269396" in card
    assert "1024, 512" in card
    assert "- temperature: 2.0" in card
    assert "- ensemble: mean_probabilities" in card
    assert "learning_rate: 3.0e-05" in card
    assert "cuts 3 selection rows at its maximum length" in card
    assert "2 dev texts" in card
    assert "selected on dev" not in card


LEARNABLE = {
    **{"metric": "accuracy", "rows": 90, "majority": 0.5, "finetuned": 0.8, "best_teacher": 0.85},
    **{"best_name": "a", "ensemble": 0.9, "gap": 0.1, "interval": [0.02, 0.18], "verdict": "yes"},
}


def test_the_gap_that_is_kept_stands_on_the_card_and_so_does_that_there_is_none(tmp_path):
    run = make_run(tmp_path / "run")
    kept = {"finetuned": 0.8, "student": 0.85, "ensemble": 0.9, "share": 0.5}
    none = {"finetuned": 0.8, "student": 0.75, "ensemble": 0.7}
    splits = {"selection": kept, "validation": kept, "other": none}
    write_json(run / "learnable.json", {**LEARNABLE, "splits": splits})
    write_report(run)
    card = (run / "README.md").read_text()
    assert "Is there anything to learn: **yes**. The ensemble's gap over the fine-tuned" in card
    between = "gap between fine-tuned student (0.8000) and ensemble"
    assert f" On validation the student keeps 50% of the {between} (0.9000)." in card
    assert f" On other there is no {between} (0.7000)." in card
    assert "On selection" not in card


@pytest.mark.parametrize("task", ["sst2", "multirc"])
def test_the_deviation_of_sampling_is_given_where_rows_are_independent(tmp_path, task):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "task": task}))
    write_report(run)
    card = (run / "README.md").read_text()
    said = "On 872 rows, one standard deviation of sampling is 0.9 points." in card
    assert said == (task == "sst2")


def test_neither_secrets_nor_local_paths_reach_the_card(tmp_path):
    run = make_run(tmp_path / "run")
    write_report(run)
    card = (run / "README.md").read_text()
    assert "plainsecret" not in card
    assert "hf_abc" not in card
    assert "somebody" not in card
    assert str(tmp_path) not in card
    assert "- path: teacher-0" in card  # the base name stays


def test_figures_selected_on_dev_are_marked_in_every_table_and_in_the_metadata(tmp_path):
    run = make_run(tmp_path / "run")
    change(run / "scores.json", selected_on="dev")
    write_report(run)
    text = (run / "README.md").read_text()
    headers = [line for line in text.splitlines() if line.startswith(("| model", "| eval_"))]
    assert len(headers) == 3
    assert all("accuracy (selected on dev)" in line for line in headers)
    (result,) = ModelCard.load(run / "README.md").data.eval_results
    assert result.metric_name == "accuracy (selected on dev)"


def test_two_evaluation_splits_have_a_table_and_a_result_each(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "task": "mnli"}))
    names = ("validation_matched", "validation_mismatched")
    splits = {n: {"student": {"accuracy": s}} for n, s in zip(names, (0.8277, 0.831), strict=True)}
    write_json(
        run / "scores.json", {"metric": "accuracy", "splits": splits, "selected_on": "held_out"}
    )
    further = {k.replace("eval_", "eval_validation_mismatched_"): v for k, v in RESULTS.items()}
    write_json(run / "eval_results.json", {**RESULTS, **further})
    make_predictions(run, names[0], classes=3)
    write_report(run)
    card = ModelCard.load(run / "README.md")
    found = {r.dataset_split: r.metric_value for r in card.data.eval_results}
    assert found == dict(zip(names, (0.8277, 0.831), strict=True))
    assert card.text.count("| eval_accuracy |") == 1
    assert card.text.count("| eval_validation_mismatched_accuracy |") == 1


@pytest.mark.parametrize(
    ("student", "summary", "base"),
    [
        ({"path": "owner/name@main"}, {}, "owner/name"),
        ({"path": None, "shape": "L6-H256-A8"}, {}, None),
        ({"path": "/home/jo/student"}, {}, None),
        ({"path": "out/student"}, {"base_model": None}, None),
        ({"path": "bert-base-uncased"}, {"base_model": "bert-base-uncased"}, "bert-base-uncased"),
    ],
)
def test_the_base_model_is_named_where_the_student_is_a_hub_id(tmp_path, student, summary, base):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "student": student}))
    change(run / "run_summary.json", **summary)
    write_report(run)
    assert ModelCard.load(run / "README.md").data.base_model == base


@pytest.mark.parametrize("said", [{}, {"license": "mit", "language": "de"}])
def test_the_card_names_a_licence_and_a_language_only_where_they_are_given(tmp_path, said):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "card": said}))
    write_report(run)
    data = ModelCard.load(run / "README.md").data
    assert (data.license, data.language) == (said.get("license"), said.get("language"))
    assert said or "license" not in (run / "README.md").read_text().split("\n---\n")[0]


@pytest.mark.parametrize(
    ("keys", "title"),
    [
        ({"method": "sead"}, "sead-"),
        ({"method": "my/own.yaml"}, "own-"),
        ({}, "mean_probabilities-"),
    ],
)
def test_the_title_names_the_method(tmp_path, keys, title):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **keys}))
    write_report(run)
    card = (run / "README.md").read_text()
    assert f"\n# {title}xtremedistil-l6-h256-uncased-sst2\n" in card
    assert ("after SEAD" in card) == (keys == {"method": "sead"})


def test_the_call_of_ones_own_task_of_two_texts_gives_both(tmp_path):
    run = make_run(tmp_path / "run")
    own = {"name": "own", "text_a": "{a}", "text_b": "{b}", "labels": ["no", "yes"]}
    (run / "task.yaml").write_text(yaml.safe_dump(own), "utf-8")
    write_report(run)
    card = (run / "README.md").read_text()
    assert 'classify({"text": "The first text.", "text_pair": "The second text."})' in card
    assert "A sentence to judge." not in card
