"""Hints lead on: what is suggested is near, exists, and is what was meant."""

import pytest
from small import ALONE, read, words, write_task
from transformers import PretrainedConfig
from transformers.utils import logging

from sead_dist.cli.commands import attempt_recipe, main
from sead_dist.config.load import load_config
from sead_dist.config.names import letters_apart, nearest
from sead_dist.config.schema import StudentConfig, TeacherConfig
from sead_dist.data.splits import load_examples, load_official
from sead_dist.data.tasks import load_task
from sead_dist.errors import UserError
from sead_dist.models.pretrained import locate
from sead_dist.models.start import student_tokenizer
from sead_dist.runs.distillation import distill, finetune
from sead_dist.runs.predicted_rows import predict_file
from sead_dist.runs.prediction import class_order, data_of, evaluate_model, task_of
from sead_dist.runs.shown import resolve_all
from sead_dist.runs.teacher_labels import write_rows
from sead_dist.runtime.run_log import noted


@pytest.fixture
def data(tmp_path):
    return write_task(tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("temperatur", "temperature"),
        ("aplha", "alpha"),  # two neighbours swapped
        ("aplah", "alpha"),
        ("ALPHA", "alpha"),
        ("alphabet", None),
        ("task", None),
        ("sale", None),  # less than three of its letters
        ("a", None),
    ],
)
def test_did_you_mean_is_said_of_names_within_two_letters(name, found):
    assert nearest(name, ["gate", "alpha", "temperature", "seed"]) == found


def test_letters_apart_are_counted():
    pairs = {("abc", "abc"): 0, ("abc", "acb"): 1, ("abc", "abcd"): 1, ("abc", "xyc"): 2}
    assert {pair: letters_apart(*pair) for pair in pairs} == pairs
    assert letters_apart("abcdef", "ghijkl") == letters_apart("a", "abcdef") == 3


def test_a_task_file_given_as_a_configuration_is_the_task(tmp_path, data):
    config = load_config([str(data / "task.yaml"), f"output_dir={tmp_path / 'run'}", "seed=3"])
    assert (config.task, config.seed) == (str(data / "task.yaml"), 3)


def test_a_key_apart_from_its_value_is_told_as_such():
    with pytest.raises(UserError, match=r"data.path is a key, .*; write data.path=grammar$"):
        load_config(["task=sst2", "data.path", "grammar"])
    with pytest.raises(UserError, match=r"seed is a key, .*; write seed=VALUE$"):
        load_config(["task=sst2", "seed"])
    with pytest.raises(UserError, match=r"data.path is a key, .*; write data.path=grammar$"):
        load_config(["task=sst2", "data.path", "=grammar"])


def test_a_folder_given_as_a_configuration_is_told_as_such(tmp_path):
    with pytest.raises(
        UserError, match=r"is a folder; give a YAML file, or KEY=VALUE \(data.path="
    ):
        load_config([str(tmp_path), "output_dir=run"])
    (tmp_path / "shape.yaml").write_text("model_type: bert\nhidden_size: 32\n")
    with pytest.raises(UserError, match=r"is the shape of a model; give student=.*shape.yaml, or"):
        load_config([str(tmp_path / "shape.yaml"), "output_dir=run"])
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    with pytest.raises(UserError, match=rf"is a folder; give its file {tmp_path}/config.yaml$"):
        load_config([str(tmp_path), "output_dir=run"])


def test_no_hint_names_a_file_that_an_installed_package_has_not():
    with pytest.raises(UserError, match="see `sead-dist keys alpha`"):
        load_config(["task=sst2", "output_dir=run", "alpha=2"])
    with pytest.raises(
        UserError, match="unknown key 'nothing_like_it'; `sead-dist keys` lists all"
    ):
        load_config(["task=sst2", "output_dir=run", "nothing_like_it=2"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "teachers=[{predictions:gpt.csv}]",
            "unknown key 'teachers.0.predictions:gpt.csv'; write `predictions: gpt.csv`, with a "
            "blank after the colon",
        ),
        (
            "teachers=[{predictions: gpt.csv, abstain: unsure}]",
            "teachers.0.abstain='unsure': expected a list; give [unsure]; see `sead-dist keys "
            "teachers.abstain`",
        ),
        (
            "teachers=[{model: m, prompt: 'x {sentence}', words: {positive: good}}]",
            "teachers.0.words.positive='good': expected a list; give [good]; see `sead-dist keys "
            "teachers.words`",
        ),
        (
            "teachers=[{path: m, labels: 3}]",
            "teachers.0.labels='3': expected a list; give ['3']; see `sead-dist keys "
            "teachers.labels`",
        ),
        (
            "teachers=[{endpoint: 'http://u:hunter2@h/v1', model: x, prompt: p, words: {a: [b]}}]",
            "teachers.0: endpoint has a user, a password, a query or a fragment, and a run stores "
            "its configuration; give the URL alone, and the API key in the variable OPENAI_API_KEY; see "
            "`sead-dist keys teachers`",
        ),
        (
            "teachers=[{name: m}]",
            "teachers.0.path is not set; give it in the entry: {path: VALUE, ...}",
        ),
        (
            "teachers.0.weight=3",
            "teachers.0.weight: KEY=VALUE sets the whole list teachers, not a part of an entry; write "
            "teachers='[{path: DIR, weight: 3}]'",
        ),
        (
            "teachers.path=a",
            "teachers.path: KEY=VALUE sets the whole list teachers, not a part of an entry; "
            "write teachers='[{path: a}]'",
        ),
        (
            "teachers.0=a",
            "teachers.0: KEY=VALUE sets the whole list teachers, not a part of an entry; write "
            "teachers='[a]'",
        ),
        (
            "teachers.0.weigth=3",
            "teachers.0.weigth: KEY=VALUE sets the whole list teachers, not a part of an "
            "entry; write teachers='[{path: DIR, KEY: VALUE}]'",
        ),
        (
            "push_to_hub=maybe",
            "push_to_hub='maybe': expected true or false; give one of them; see `sead-dist keys "
            "push_to_hub`",
        ),
        (
            "augment.operations=[]",
            "augment.operations=[]: expected more values; give at least one; see `sead-dist keys "
            "augment.operations`",
        ),
        (
            "max_steps=true",
            "max_steps=true: input should be a number, not true or false; see `sead-dist keys "
            "max_steps`",
        ),
        (
            "augment=3",
            "augment=3: augment is a group of keys (copies, operations, gold_labels); write "
            "augment.KEY=VALUE; see `sead-dist keys augment`",
        ),
        (
            "unlabeled=new.txt",
            "unlabeled='new.txt': unlabeled is a group of keys (path, rest, ratio); write "
            "unlabeled.path=new.txt; see `sead-dist keys unlabeled`",
        ),
        (
            "teachers=[{path: m, wieght: 2}]",
            "unknown key 'teachers.0.wieght'; did you mean 'weight'?",
        ),
        (
            "encoders=[{path: m, revison: main}]",
            "unknown key 'encoders.0.revison'; did you mean 'revision'?",
        ),
        (
            "teachers=[{path: m, nothing_like_it: 2}]",
            "unknown key 'teachers.0.nothing_like_it'; `sead-dist keys teachers` lists all",
        ),
        (
            "max_train_examples=10",
            "unknown key 'max_train_examples'; did you mean data.max_train_examples?",
        ),
        ("fraction=0.2", "unknown key 'fraction'; did you mean selection.fraction?"),
        ("weight=2", "unknown key 'weight'; `sead-dist keys` lists all"),
        (
            "max_steps=1.5",
            "max_steps=1.5: expected a whole number, such as 10; see `sead-dist keys max_steps`",
        ),
        (
            "alpha=much",
            "alpha='much': expected a number, such as 0.1; see `sead-dist keys alpha`",
        ),
        (
            "augment.operations=mask, swap",
            "augment.operations='mask, swap': expected a list; give [mask, swap]; see `sead-dist "
            "keys augment.operations`",
        ),
        (
            "augment.operations=masks",
            "augment.operations='masks': expected a list; see `sead-dist keys augment.operations`",
        ),
        (
            "student.layers=last",
            "student.layers='last': expected a list; give [NUMBER, NUMBER]; see `sead-dist keys "
            "student.layers`",
        ),
        (
            "teachers={path: m, abstain: 3}",
            "teachers.0.abstain=3: expected a list; give ['3']; see `sead-dist keys "
            "teachers.abstain`",
        ),
        (
            "fold=3",
            "fold=3 does not exist: folds is null; give folds=4 or more, or leave fold out",
        ),
    ],
)
def test_a_mistake_is_told_in_yaml_s_words_and_leads_to_a_key_that_is_listed(word, said):
    with pytest.raises(UserError) as caught:
        load_config(["task=sst2", "output_dir=run", word])
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("predict", "the following arguments are required: model, file; see 'sead-dist predict "),
        ("predict a b --kind foo", "argument --kind: invalid choice: 'foo'"),
        ("distill sst2 --foo", "unrecognized arguments: --foo; see 'sead-dist distill --help'"),
        ("store foo", "argument VERB: invalid choice: 'foo'"),
        (
            "distill sst2 --max-steps 9",
            "unrecognized arguments: --max-steps 9; keys have no dashes: max_steps=9; see",
        ),
        (
            "distill sst2 --alpha=1",
            "unrecognized arguments: --alpha=1; keys have no dashes: alpha=1; see",
        ),
        ("evaluate run data.path=x", "unrecognized arguments: data.path=x; write --data x; see"),
        ("evaluate run model=x", "unrecognized arguments: model=x; see"),
        ("labels sst2 --rows x.tsv seed=1 --foo", "unrecognized arguments: seed=1 --foo; see"),
        (
            "predict run new.csv output=x.csv",
            "unrecognized arguments: output=x.csv; write --output x.csv",
        ),
        ("jbos", "'jbos' is not a command; did you mean 'jobs'?; see 'sead-dist --help'"),
        ("nothing_like_it", "'nothing_like_it' is not a command; commands: distill, finetune, "),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(given, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(given.split())
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"sead-dist: {said}")
    assert told.count("\n") == 1


def test_a_shape_s_student_beside_a_file_is_told_what_has_a_tokeniser():
    teachers = [TeacherConfig.model_validate({"predictions": "gpt.csv"})]
    student = StudentConfig(path=None, shape="L2-H128-A2")
    with pytest.raises(UserError, match=r"or give a teacher that is a model \(a file of pred"):
        student_tokenizer(student, teachers)
    with pytest.raises(UserError, match=r"set student.tokenizer=FOLDER, or give teachers$"):
        student_tokenizer(student, [])


def test_finetune_offers_no_teachers_for_the_tokeniser_of_a_shape(tmp_path, data):
    given = words(data, [], tmp_path / "run", encoders=f"[{data / 'student.yaml'}]")
    kept = [word for word in given if not word.startswith(("student.", "teachers="))]
    with pytest.raises(UserError) as caught:
        finetune(load_config(kept), ALONE)
    assert str(caught.value) == (
        f"{data / 'student.yaml'} is a shape, which has no tokeniser; set student.tokenizer=DIR, a "
        "folder or hub id that has one"
    )


def test_print_config_refuses_a_file_of_predictions_that_is_not_there(tmp_path, data):
    given = words(data, [], tmp_path / "run")
    config = load_config([*given, "teachers=[{predictions: /no/gpt.csv}]"])
    with pytest.raises(UserError, match=r"predictions=/no/gpt.csv does not exist; give a file"):
        resolve_all(config, ALONE)


def test_finetune_silences_libraries_before_its_first_check(tmp_path, data):
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        given = words(data, [], tmp_path / "run")
        assert attempt_recipe("finetune", [*given, "encoders=[/no/where]"]) == 2
        assert logging.get_verbosity() == logging.ERROR
    finally:
        logging.set_verbosity(before)


def test_labels_names_the_option_that_was_given(tmp_path):
    config = load_config(["task=sst2", "output_dir=run"])
    with pytest.raises(UserError, match=r"--rows .*rows.txt: unknown kind '.txt'"):
        write_rows(config, tmp_path / "rows.txt")


def test_a_model_or_a_file_that_is_not_there_is_told_before_anything(tmp_path, data):
    with pytest.raises(
        UserError, match=r"nosuch does not exist; give a run directory or a model's"
    ):
        predict_file("nosuch", tmp_path / "new.tsv", None, None, None)
    with pytest.raises(
        UserError, match=r"nosuch does not exist; give a run directory or a model's"
    ):
        evaluate_model("nosuch", None, None, None, None, None)
    with pytest.raises(UserError, match=r"data is a folder; give a file"):
        predict_file("nosuch", data, None, None, None)


def test_labels_against_a_model_s_own_names_are_told_and_bad_ones_are_named(data, caplog):
    task = load_task(str(data / "task.yaml"))
    own = PretrainedConfig(id2label=dict(enumerate(task.labels)))
    with pytest.raises(UserError, match=r"^--labels a,b: 'a' is not a label of task grammar"):
        class_order("m", own, task, ["a", "b"])
    assert class_order("m", own, task, list(task.labels)) == [0, 1]
    assert caplog.messages == []
    turned = list(reversed(task.labels))
    assert class_order("m", own, task, turned) == [1, 0]
    assert caplog.messages == [
        f"--labels {','.join(turned)} is used, although m names its classes {', '.join(task.labels)}"
    ]


def test_labels_that_the_task_file_lacks_are_listed_at_once_with_their_counts(tmp_path, data):
    lines = (data / "train.tsv").read_text().splitlines()
    for number, label in ((3, "neutral"), (4, "mixed"), (9, "neutral")):
        lines[number] = lines[number].split("\t")[0] + f"\t{label}"
    (data / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        load_examples(
            load_config(words(data, [], tmp_path / "run")),
            load_task(str(data / "task.yaml")),
        )
    line = str(caught.value)
    assert line.startswith("train row 3: label 'neutral' in column 'label' is outside the set;")
    assert "labels outside the set: 'neutral' (2 rows), 'mixed' (1 row); add them to labels" in line
    assert line.endswith(f"in the task's file, or fix the rows ({data / 'train.tsv'})")


@pytest.mark.parametrize("count", [1, 2])
def test_a_label_that_is_not_there_is_told_with_its_file_and_how_many_there_are(
    tmp_path, data, count
):
    file = data / "train.tsv"
    lines = file.read_text().splitlines()
    for number in range(3, 3 + count):
        lines[number] = lines[number].split("\t")[0] + "\t"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        load_examples(
            load_config(words(data, [], tmp_path / "run", method="finetune")),
            load_task(str(data / "task.yaml")),
        )
    rows = "1 row" if count == 1 else "2 rows"
    assert str(caught.value) == (
        "train row 3: label '' in column 'label' is outside the set; allowed: negative, positive, "
        f"0, 1; the row has no label ({rows} without one in all); fill it in, or leave such rows out "
        f"({file})"
    )


def test_a_column_that_is_not_there_may_be_named_in_the_task_file_too(tmp_path, data):
    for given, other, missing, key in (
        ("label_column: label", "label_column: team", "team", "label_column"),
        ("sentence", "text", "text", "text_a"),
    ):
        file = tmp_path / f"{missing}.yaml"
        text = (data / "task.yaml").read_text().replace(given, other)
        file.write_text(text if other in text else f"{text}{other}\n")
        told = f"no column '{missing}'; .* or name one with {key} in the task's file.*train.tsv\\)$"
        with pytest.raises(UserError, match=told):
            load_official(load_task(str(file)), data_of("m", "grammar", str(data)), "train")


def test_a_folder_of_models_is_told_with_the_models_in_it(tmp_path):
    for name in ("teacher-0", "teacher-1"):
        (tmp_path / name / "model").mkdir(parents=True)
        for file in ("config.json", "tokenizer.json"):
            (tmp_path / name / "model" / file).write_text("{}")
    folder = str(tmp_path)
    told = f"{folder} is a folder of models (teacher-0, teacher-1); give one of them, such as "
    told += f"{folder}/teacher-0"
    student = StudentConfig(path=folder)
    taught = StudentConfig(path=None, shape="L2-H128-A2")
    for ask, all_ in (
        (lambda: locate(folder), ""),
        (lambda: task_of(folder, None), ""),
        (lambda: student_tokenizer(student, [TeacherConfig(path="m")]), ""),
        (
            lambda: student_tokenizer(taught, [TeacherConfig(path=folder)]),
            f", or all: teachers={folder}/*",
        ),
        (lambda: locate(folder, as_teacher=True), f", or all: teachers={folder}/*"),
    ):
        with pytest.raises(UserError) as caught:
            ask()
        assert str(caught.value) == told + all_


def test_the_model_of_a_run_is_told_with_its_run(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    model = tmp_path / "run" / "model"
    told = rf"model is the model of a run; give .*: {model.parent}$"
    with pytest.raises(UserError, match=told):
        task_of(str(model), None)
    # an exported student has its ONNX files in a folder of their own
    (model / "onnx").mkdir()
    for folder in (model, model / "onnx"):
        (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=told):
        task_of(str(model), None)


def test_evaluate_tells_of_its_option_and_of_no_key(tmp_path, data):
    for given, said in (
        (str(tmp_path / "no"), r"^--data .*no does not exist; give the folder"),
        (None, "^task 'grammar' is not on the hub; give --data, a folder"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate_model(str(tmp_path), str(data / "task.yaml"), given, None, None, None)


def one_file_words(data, root, **changes):
    """The words of a run whose only file is train.tsv."""
    given = words(
        data, [], root / "run", max_steps=2, **{"data__validation_fraction": 0.2, **changes}
    )
    kept = [word for word in given if not word.startswith("data.path=")]
    return [*kept, f"data.train={data / 'train.tsv'}"]


def test_one_file_is_split_by_its_texts_and_not_by_its_order(tmp_path, data):
    header, *lines = (data / "train.tsv").read_text().splitlines()
    doubled = [*lines, *lines[:30]]  # rows that share a text stay together
    (data / "train.tsv").write_text("\n".join([header, *doubled]) + "\n")
    task = load_task(str(data / "task.yaml"))
    with noted() as said:
        one = load_examples(load_config(one_file_words(data, tmp_path)), task)
    assert "data.train is the only file: " in said[0]
    parts = [one.train.texts_a, one.selection.texts_a, one.official["validation"].texts_a]
    texts = [set(part) for part in parts]
    assert sum(map(len, parts)) == 90
    assert not texts[0] & texts[1]
    assert not texts[2] & (texts[0] | texts[1])
    assert 16 <= len(parts[2]) <= 18
    # neither the order of the file nor the run's seeds decide
    (data / "train.tsv").write_text("\n".join([header, *reversed(doubled)]) + "\n")
    given = one_file_words(data, tmp_path, selection__seed=4, seed=9)
    again = load_examples(load_config(given), task)
    assert set(again.official["validation"].texts_a) == texts[2]
    assert set(again.selection.texts_a) != texts[1]


def test_a_run_of_one_file_trains_and_is_scored_on_what_was_cut_off(tmp_path, data, capsys):
    run = distill(load_config(one_file_words(data, tmp_path)), ALONE, show_table=False)
    assert read(run / "scores.json")["splits"].keys() == {"selection", "validation"}
    assert read(run / "eval_results.json")["eval_samples"] == 12
    held = load_official(
        load_task(str(data / "task.yaml")), data_of(str(run), None, None), "validation"
    )
    assert len(held) == 12
    # the progress line has the selection score
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if line.startswith("training: 2/2")]
    assert "selection_accuracy=" in line
