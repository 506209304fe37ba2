"""A person's mistakes: one line that names the value, what is allowed and the fix; nothing is
written over. Failures during a run: one line, and the last checkpoint intact.

What is refused is asked for in this process; exit codes and streams in processes of their own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import ALONE, model_bytes
from transformers import AutoTokenizer

from sead_dist.cli.grammar import write_grammar_task
from sead_dist.errors import RunError, UserError

FIXTURES = Path(__file__).parent.parent / "fixtures"


def contents(folder):
    """Every file below `folder` with its bytes and time of change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def refused(words, distil, tmp_path):
    """`refused(message, *words)`: the run is refused with one line that matches, and has made no
    output folder. Returns the line."""

    def run(message, *more, error=UserError):
        out = tmp_path / "out"
        with pytest.raises(error) as caught:
            distil(words(out, *more))
        line = str(caught.value)
        assert re.search(message, line), line
        assert "\n" not in line
        assert not out.exists()
        return line

    return run


@pytest.fixture
def changed(grammar, tmp_path):
    """`changed("train.tsv", text)`: a copy of the task's folder with this file changed."""

    def make(name, text):
        folder = tmp_path / "changed"
        shutil.copytree(grammar, folder, dirs_exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        return f"data.path={folder}"

    return make


@pytest.fixture
def teacher(teachers, tmp_path):
    """`teacher(key=value, ...)`: a copy of a teacher with changes to its config.json."""

    def make(source=0, **config):
        folder = tmp_path / "teacher"
        shutil.copytree(teachers[source], folder)
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**said, **config}))
        return folder

    return make


# data


def test_a_missing_data_folder_or_file(refused, grammar):
    refused(r"data.path /no/where does not exist; give the folder", "data.path=/no/where")
    refused(r"/no/dev.tsv does not exist; give an existing", "data.validation=/no/dev.tsv")
    refused(r"/no/more.tsv does not exist; give an existing", "unlabeled.path=/no/more.tsv")
    line = refused(
        r"no train file in .*; expected train with", f"data.path={grammar / 'tokenizer'}"
    )
    assert "data.train=FILE" in line


def test_a_missing_column(refused, changed):
    line = refused(
        r"train row 1: no column 'sentence'", changed("train.tsv", "text\tlabel\na\t1\n")
    )
    assert "its columns: text, label; rename one" in line
    # with teachers it is a run without gold labels (tests/runs/test_without_gold.py)
    refused(r"no column 'label'; its columns: sentence", changed("train.tsv", "sentence\na\n"),
            "method=finetune")  # fmt: skip


def test_a_label_outside_the_set(refused, changed):
    text = "sentence\tlabel\ngood\tpositive\nbad\tterrible\n"
    line = refused(r"train row 2: label 'terrible'", changed("train.tsv", text))
    assert "allowed: negative, positive, 0, 1; labels outside the set: 'terrible' (1 row)" in line


def test_a_malformed_row(refused, changed):
    text = "sentence\tlabel\ngood\tpositive\nbad\n"
    refused(r"train.tsv:3: 1 field where 2 are.*skip_malformed", changed("train.tsv", text))


def test_an_empty_split(refused, changed, tmp_path):
    data = changed("validation.tsv", "sentence\tlabel\n")
    refused(r"the validation split has no rows in .*validation.tsv; give a file", data)
    (tmp_path / "empty.tsv").write_text("sentence\n")
    refused(r"unlabeled.path=.*empty.tsv has no rows", f"unlabeled.path={tmp_path / 'empty.tsv'}")


def test_a_selection_split_without_rows(refused):
    refused(
        r"selection.fraction=0.0001 of 400 .* raise selection.fraction", "selection.fraction=0.0001"
    )


def without_special_tokens(folder):
    """The tokeniser in a folder no longer adds any of its own, as GPT-2's does not."""
    rules = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**rules, "post_processor": None}))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def test_a_text_without_a_token_is_refused_before_there_is_any_output(
    refused, changed, teacher, teachers, grammar, tmp_path, words
):
    from sead_dist.config.load import load_config
    from sead_dist.runs.distillation import finetune

    lines = (grammar / "validation.tsv").read_text().split("\n")
    lines[3] = f" \u200b\t{lines[3].split(chr(9))[1]}"
    data = changed("validation.tsv", "\n".join(lines))
    bare = without_special_tokens(teacher())
    line = refused(
        r"row 3 of validation has a text without a token for teacher teacher, whose",
        data,
        f"teachers=[{bare}]",
        f"student.tokenizer={grammar / 'tokenizer'}",
    )
    assert line.endswith("fill in the text, or remove the row")
    encoders = [word for word in words(tmp_path / "out", data) if not word.startswith("teachers=")]
    with pytest.raises(UserError, match=rf"row 3 of validation .* for {bare}, whose"):
        finetune(load_config([*encoders, f"encoders=[{teachers[0]},{bare}]"]), ALONE)
    assert not (tmp_path / "out").exists()


# configuration


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("temperatur=3", r"unknown key 'temperatur'; did you mean 'temperature'"),
        ("data.pth=x", r"unknown key 'data.pth'; did you mean 'data.path'"),
        ("teachers=[{path: a, lables: [x]}]", r"unknown key 'teachers.0.lables'; did you mean 'labels'"),
        ("num_train_epochs=many", r"num_train_epochs='many': .*expected a whole number, such as 10; see `sead-dist keys num_train_epochs`"),
        ("num_train_epochs=0", r"num_train_epochs=0: .*greater than 0"),
        ("ensemble=best", r"ensemble='best': .*'mean_logits'.*'random'"),
        ("task=", r"task is not set; give task=VALUE"),
        ("task=sst3", r"unknown task 'sst3'; did you mean 'sst2'\?"),
        ("micro_batch_size=7", r"micro_batch_size=7 does not divide global_batch_size=32; .*micro_batch_size=4"),
        ("select=[1, 2", r"the value of select.* is not valid YAML: .*; correct it"),
        ("student.shape=L6-H257", r"student.shape=L6-H257 is neither a shipped shape nor a YAML file; known: L12-H384-A12, L6"),
        ("student.shape=null", r"no student is set; give student=DIR"),
        ("teachers=/no/where/*", r"teachers=/no/where/\* matches no folder"),
    ],
)  # fmt: skip
def test_wrong_words(word, message, refused):
    refused(message, word)


def test_a_wrong_yaml_file(words, distil, refused, tmp_path):
    file = tmp_path / "mine.yaml"
    for text, message in (
        (
            "epochs: 3\nalpha: [1, 2\nseed: 4\n",
            r"mine.yaml, line 3 is not valid YAML: .*; correct this line or the one before it$",
        ),
        ("- epochs\n", r"mine.yaml' holds no keys; expected a YAML mapping"),
        ("epoch: 3\n", r"unknown key 'epoch'; did you mean 'num_train_epochs'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            distil([str(file), *words(tmp_path / "out")])
        assert "\n" not in str(caught.value)
    task = tmp_path / "task.yaml"
    task.write_text("name: mine\nkind: classification\ntext_a: '{text}'\nlabels: [a, b\n")
    refused(r"task.yaml.* is not valid YAML: ", f"task={task}")
    task.write_text("name: mine\ntext: '{text}'\n")
    refused(r"unknown key 'text'; did you mean 'text_[ab]'", f"task={task}")


def test_a_config_that_is_no_text(words, distil, teachers, tmp_path):
    weights = teachers[0] / "model.safetensors"
    with pytest.raises(UserError, match=r"is not a text file; give a YAML file, or KEY=VALUE"):
        distil([str(weights), *words(tmp_path / "run")])


def test_fp16_on_a_cpu_and_a_tracker_that_is_not_there(refused):
    refused("precision=fp16 needs a GPU; on a CPU give precision=bf16", "precision=fp16")
    refused(
        "report_to=wandb needs the package wandb, which is not installed; pip install wandb",
        "report_to=wandb",
    )
    refused("report_to=diary is not a tracker; give one of ", "report_to=diary")


def test_a_config_file_that_is_not_there(words, distil, tmp_path):
    with pytest.raises(UserError, match="'sst' is neither a file nor a shipped config; did you"):
        distil(["sst", *words(tmp_path / "out")])


def test_what_needs_classes_is_refused_for_regression(refused):
    data = [f"data.path={FIXTURES / 'stsb'}", "task=stsb"]
    refused(r"ensemble=entropy.*regression", *data, "ensemble=entropy", "loss=mse")
    refused(r"loss=kl.*loss=mse", *data, "loss=kl")


# teachers


def test_num_labels_that_differ(refused, grammar, tmp_path):
    task = tmp_path / "three.yaml"
    fields = {"name": "three", "text_a": "{sentence}", "labels": ["negative", "none", "positive"]}
    task.write_text(yaml.safe_dump(fields))
    line = refused(r"a has num_labels=2 but task three needs 3", f"task={task}")
    assert "(negative, none, positive); give a model fine-tuned for this task" in line


def test_class_names_that_cannot_be_aligned(refused, teacher):
    bad = teacher(id2label={"0": "spam", "1": "ham"})
    line = refused(r"names its classes spam, ham: 'spam' is not a label of", f"teachers=[{bad}]")
    assert f"{{path: {bad}, labels: [negative, positive]}}" in line


def test_classes_without_names_and_the_line_that_fixes_it(
    refused, teacher, words, distil, tmp_path
):
    nameless = teacher(1, id2label={"0": "LABEL_0", "1": "LABEL_1"})
    line = refused(
        r"names its classes LABEL_0, LABEL_1, which does not show their order",
        f"teachers=[{nameless}]",
    )
    entry = re.search(r"\{path: .*?\]\}", line)[0]
    # as it stands it says the task's order, in which this teacher is wrong: it is told so
    with pytest.raises(UserError, match="failed its validation") as caught:
        distil(words(tmp_path / "run", f"teachers=[{entry}]", "max_steps=1"))
    better = re.search(r"\{path: .*?\]\}", str(caught.value))[0]
    assert better.endswith("labels: [positive, negative]}")
    run = distil(words(tmp_path / "run", f"teachers=[{better}]", "max_steps=1"))
    assert json.loads((run / "teacher_validation.json").read_text())[0]["passed"]


def test_a_tokeniser_without_padding_token(refused, teacher):
    folder = teacher()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"pad_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(r'teacher: .*no padding token; set "pad_token" in its', f"teachers=[{folder}]")


def test_a_teacher_without_tokeniser(refused, teacher, grammar):
    folder = teacher()
    for path in folder.glob("*token*"):
        path.unlink()
    message = r"teacher: (its tokeniser cannot be read|its tokeniser has no vocabulary)"
    refused(message, f"teachers=[{folder}]", f"student.tokenizer={grammar / 'tokenizer'}")


def test_a_teacher_without_weights(refused, teacher):
    folder = teacher()
    (folder / "model.safetensors").unlink()
    refused(
        r"teacher holds no weights; give a folder that has one of model.safetensors",
        f"teachers=[{folder}]",
    )


def test_a_teacher_whose_weights_are_cut_off(refused, teacher):
    folder = teacher()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    refused(r"teacher: model.safetensors: its weights cannot be read: ", f"teachers=[{folder}]")


def test_a_teacher_that_is_no_checkpoint(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(r"empty holds no .*; give a folder", f"teachers=[{tmp_path / 'empty'}]")
    refused(r"/no/where is not a folder; give a checkpoint", "teachers=[/no/where]")
    file = tmp_path / "gpt.csv"
    file.write_text("id,prediction\n")
    said = (
        rf"is not a folder; .* or a file of predictions: \{{predictions: {re.escape(str(file))}\}}"
    )
    refused(said, f"teachers=[{file}]")
    refused(
        r"no-such-model is neither a folder nor reachable on the hub", "teachers=[no-such-model]"
    )


def test_a_teacher_that_was_never_fine_tuned(refused, teacher):
    folder = teacher()
    weights = load_file(folder / "model.safetensors")
    body = {name: tensor for name, tensor in weights.items() if "classifier" not in name}
    save_file(body, folder / "model.safetensors", {"format": "pt"})
    refused("never fine-tuned to classify; fine-tune it first", f"teachers=[{folder}]")


def test_a_teacher_whose_tokeniser_has_more_words_than_it(refused, teacher):
    small = teacher(vocab_size=20)
    refused(r"has 20 word embeddings but its tokeniser has \d+ words", f"teachers=[{small}]")


def test_a_teacher_no_better_than_a_constant(words, distil, teacher, tmp_path):
    folder = teacher()
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as caught:
        distil(words(tmp_path / "run", f"teachers=[{folder}]", "max_steps=1"))
    assert re.search(
        r"teacher teacher failed its validation: accuracy 0\.\d+ on \d+ selection rows, no better "
        r"than the majority baseline \(0\.\d+\).*teacher_validation=off",
        str(caught.value),
    )
    # refused before its first step, it does not hold the folder: the fix works as it is written
    run = distil(
        words(tmp_path / "run", f"teachers=[{folder}]", "max_steps=1", "teacher_validation=off")
    )
    assert (run / "model" / "model.safetensors").is_file()


# the output folder


def test_an_output_folder_that_holds_another_run(finished, words, distil, teachers):
    before = contents(finished)
    for more, message in (
        (["seed=7"], r"holds another run: seed was 0, is 7; give the same settings"),
        (["temperature=9", "alpha=0.1"], r"temperature was 1.0, is 9.0; alpha was 0.9, is 0.1"),
        (
            [f"teachers=[{teachers[0]}]"],
            r"holds a finished run with other teachers .*another output",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            distil(words(finished, "num_train_epochs=6", *more))
        assert "\n" not in str(caught.value)
    assert contents(finished) == before


def test_an_unfinished_run_with_other_teachers(words, distil, teachers, tmp_path):
    run = distil(words(tmp_path / "run", "max_steps=2", "save_steps=1"))
    (run / "run_summary.json").unlink()
    before = contents(run)
    with pytest.raises(UserError, match=r"holds another run: teachers were .* are "):
        distil(words(run, "max_steps=2", f"teachers=[{teachers[1]}]"))
    del before[run / ".lock"]
    after = contents(run)
    del after[run / ".lock"]
    assert after == before


def test_a_run_that_has_trained_but_not_saved_is_not_written_over(words, distil, tmp_path):
    more = ["max_steps=2", "save_steps=0"]
    run = distil(words(tmp_path / "run", *more))
    # as a kill before the first evaluation would leave it
    for name in ("run_summary.json", "eval_results.json"):
        (run / name).unlink()
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"holds another run: temperature was 1\.0, is 5\.0"):
        distil(words(run, *more, "temperature=5"))
    assert (run / "metrics.jsonl").read_bytes() == before
    distil(words(run, *more))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_run_folder_of_another_user(words, distil, tmp_path):
    run = distil(words(tmp_path / "run", "max_steps=1"))
    os.chown(run, 12345, -1)
    before = contents(run)
    with pytest.raises(UserError, match="belongs to user 12345, and you are 0; give a folder of"):
        distil(words(run, "max_steps=1"))
    assert contents(run) == before


def test_an_output_folder_of_other_things(words, distil, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for place, message in (
        (tmp_path, r"holds other files and no run; give a new or empty folder"),
        (tmp_path / "notes.txt", r"notes.txt is a file; give a folder"),
        (tmp_path / "notes.txt" / "run", r"notes.txt/run cannot be made: .*; give another"),
    ):
        with pytest.raises(UserError, match=message):
            distil(words(place))
    assert contents(tmp_path) == before


def test_the_same_words_again_do_nothing(finished, words, distil, capsys):
    before = contents(finished)
    distil(words(finished, "num_train_epochs=6"))
    said = capsys.readouterr().out
    assert "finished: nothing to do" in said
    assert "dev texts occur in" not in said  # the data are read and not told of
    assert contents(finished) == before


# exit codes and streams


def one_line(result, code):
    """The one line of ours on standard error."""
    ours = [line for line in result.stderr.splitlines() if line.startswith("sead-dist: ")]
    assert len(ours) == 1, result.stderr
    assert "sead_dist/" not in result.stderr  # no traceback through our files; torchrun has its own
    assert result.returncode == code
    return ours[0]


def test_a_mistake_exits_with_2_and_one_line(cli, words, grammar, tmp_path):
    for args in (
        ["distill", *words(tmp_path / "out", "temperatur=3")],
        ["distill", *words(tmp_path / "out", f"data.path={grammar / 'tokenizer'}")],
    ):
        result = cli(*args, launched=True)
        one_line(result, 2)
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_ranks_tell_a_mistake_once(cli, words, teacher, tmp_path):
    bad = teacher(id2label={"0": "spam", "1": "ham"})
    result = cli("distill", *words(tmp_path / "out", f"teachers=[{bad}]"), ranks=2, launched=True)
    assert "'spam' is not a label of" in one_line(result, 1)  # torchrun's own code
    assert re.search(r"exitcode *: 2", result.stderr)
    assert not (tmp_path / "out").exists()


# during a run


def spoilt(teachers, tmp_path):
    """A teacher with NaN in the embedding of one word that the unlabelled text alone holds."""
    folder = shutil.copytree(teachers[0], tmp_path / "spoilt")
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "zzz.tsv").write_text("sentence\nthe plot was zzz\n")
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("##z")
    weights["bert.embeddings.word_embeddings.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return [f"teachers=[{folder}]", f"unlabeled.path={tmp_path / 'zzz.tsv'}"]


def test_nan_logits_name_teacher_step_and_example(words, distil, teachers, tmp_path):
    more = spoilt(teachers, tmp_path)
    with pytest.raises(RunError) as caught:
        distil(words(tmp_path / "run", *more))
    line = str(caught.value)
    assert "\n" not in line
    said = (
        r"teacher spoilt gave NaN .* at step (\d+) for train row 361 \('the plot was zzz'\); check"
    )
    found = re.search(said, line)
    assert found, line
    # with windows of one step the run gets as far as the step before
    with pytest.raises(RunError, match=re.escape(line)):
        distil(words(tmp_path / "slow", *more, "prefetch_rows=1", "save_steps=1"))
    last = max((tmp_path / "slow" / "checkpoints").glob("step-*"))
    assert last.name == f"step-{int(found[1]) - 1:08d}"


@pytest.mark.slow
def test_two_ranks_tell_nan_logits_once(cli, words, teachers, tmp_path):
    more = spoilt(teachers, tmp_path)
    result = cli("distill", *words(tmp_path / "run", *more), ranks=2)
    assert "teacher spoilt gave NaN" in one_line(result, 3)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from sead_dist.cli.commands import main
main(sys.argv[2:])
"""


def limited(most_bytes, *args):
    """The command where no file can grow beyond this: writes fail as on a full disk."""
    command = [sys.executable, "-c", LIMITED, str(most_bytes), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(words, distil, tmp_path):
    saving = ["save_steps=4", "save_total_limit=9", "keep_training_state=true"]
    run = distil(words(tmp_path / "run", *saving))
    expected = model_bytes(run)
    # as a kill after step 4 would leave it
    (run / "run_summary.json").unlink()
    shutil.rmtree(run / "model")
    for later in ("step-00000008", "step-00000012"):
        shutil.rmtree(run / "checkpoints" / later)
    last = run / "checkpoints" / "step-00000004"
    before = contents(last)
    room = (last / "optimizer.pt").stat().st_size - 1
    result = limited(room, "distill", *words(run, *saving))
    line = one_line(result, 3)
    assert "checkpoint step-00000008 cannot be written" in line
    assert "the last checkpoint is intact" in line
    assert contents(last) == before
    assert not list((run / "checkpoints").glob("*.tmp"))
    distil(words(run, *saving))
    assert model_bytes(run) == expected


@pytest.mark.slow
def test_a_store_that_cannot_be_written_is_told(grammar, words, distil, tmp_path):
    task = tmp_path / "task"
    write_grammar_task(task, 0, 400, 100, 4500, label_noise=0.0)
    shape = yaml.safe_load((grammar / "shape.yaml").read_text())
    (tmp_path / "shape.yaml").write_text(yaml.safe_dump({**shape, "hidden_size": 16}))
    more = [
        f"task={task / 'task.yaml'}",
        f"data.path={task}",
        f"unlabeled.path={task / 'unlabeled.tsv'}",
        f"student.shape={tmp_path / 'shape.yaml'}",
        "max_steps=1",
    ]
    whole = distil(words(tmp_path / "whole", f"store={tmp_path / 'whole-store'}", *more))
    blocks = (tmp_path / "whole-store" / "keys").iterdir()
    room = max(block.stat().st_size for block in blocks) - 1
    # what a run writes before its store fits: only the store meets the limit
    before = [*whole.glob("*.json"), whole / "model" / "model.safetensors"]
    assert room > max(path.stat().st_size for path in before)
    args = words(tmp_path / "run", f"store={tmp_path / 'store'}", *more)
    line = one_line(limited(room, "distill", *args), 3)
    assert re.search(r"the prediction store .*/store cannot be written .*ulimit -f", line)


@pytest.mark.slow
def test_a_student_that_cannot_be_saved_is_told_before_training(words, tmp_path):
    line = one_line(limited(20_000, "distill", *words(tmp_path / "run")), 3)
    assert re.search(r"the student cannot be saved in .*/run: .*ulimit -f", line)


@pytest.mark.slow
def test_a_run_folder_that_cannot_be_written_is_told_with_the_file(words, tmp_path):
    line = one_line(limited(500, "distill", *words(tmp_path / "run")), 3)
    assert re.search(r"the student cannot be saved in .*/run: .*File too large.*; free space", line)


def test_a_finished_run_is_not_taken_for_one_on_other_data(
    words, distil, finished, grammar, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(grammar, other)
    lines = (other / "train.tsv").read_text("utf-8").splitlines()
    (other / "train.tsv").write_text("\n".join(lines[:-9]) + "\n", "utf-8")
    with pytest.raises(UserError, match="the fingerprint of data and task was"):
        distil(words(finished, "num_train_epochs=6", f"data.path={other}"))
    with pytest.raises(UserError, match="nowhere"):
        distil(words(finished, "num_train_epochs=6", f"data.path={tmp_path / 'nowhere'}"))


def test_encoders_that_are_not_there_are_found_before_the_first_is_trained(
    words, grammar, finished, tmp_path
):
    from sead_dist.config.load import load_config
    from sead_dist.runs.distillation import distill, finetune
    from sead_dist.runtime.distributed import World

    alone = World(0, 1, torch.device("cpu"))
    given = [
        f"encoders=[{grammar / 'shape.yaml'},{tmp_path / 'nowhere'}]",
        f"student.tokenizer={grammar / 'tokenizer'}",
    ]
    plain = [word for word in words(tmp_path / "out", *given) if "teachers=" not in word]
    with pytest.raises(UserError, match="nowhere is not a folder"):
        finetune(load_config(plain), alone)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="encoders is a key of finetune"):
        distill(load_config(plain), alone)
    shape = grammar / "shape.yaml"
    bad = tmp_path / "bad.yaml"
    bad.write_text("model_type: bert\nhidden_size: 30\nnum_attention_heads: 7")
    for more, message in (
        ([f"encoders=[{shape},{bad}]"], "cannot be built"),
        (
            [f"encoders=[{shape}]", "teachers=[a]"],
            "teachers is a key of distill; finetune trains teachers",
        ),
        (
            [f"encoders=[{{path: {shape}, weight: 2}}]"],
            "has weight=2.0, which is a key of teachers; .*leave weight out",
        ),
        ([f"encoders=[{shape}]", f"output_dir={finished}"], "holds a run; give another folder"),
    ):
        with pytest.raises(UserError, match=message):
            finetune(load_config([*plain, *more]), alone)
    assert not (tmp_path / "out").exists()


def test_runs_of_different_sample_sizes_never_select_on_each_others_training_rows(words, grammar):
    from sead_dist.config.load import load_config
    from sead_dist.data.splits import load_examples
    from sead_dist.data.tasks import load_task

    task = load_task(str(grammar / "task.yaml"))
    texts = {}
    for most in (60, 200, "null"):
        config = load_config(words("unused", f"data.max_train_examples={most}"))
        found = load_examples(config, task)
        texts[most] = (set(found.train.texts_a), set(found.selection.texts_a))
        if most != "null":
            assert found.labelled_rows + len(found.selection) == most
    for train, _ in texts.values():
        for _, selection in texts.values():
            assert not train & selection


def test_a_head_that_is_missing_is_told_before_its_classes_are_asked_for(refused, teacher):
    folder = teacher(id2label={"0": "LABEL_0", "1": "LABEL_1"})
    weights = load_file(folder / "model.safetensors")
    body = {name: tensor for name, tensor in weights.items() if "classifier" not in name}
    save_file(body, folder / "model.safetensors", {"format": "pt"})
    refused("never fine-tuned to classify", f"teachers=[{folder}]")


def test_teachers_are_not_put_among_other_things(words, grammar, tmp_path):
    from sead_dist.config.load import load_config
    from sead_dist.runs.distillation import finetune
    from sead_dist.runtime.distributed import World

    (tmp_path / "notes.txt").write_text("mine")
    given = [f"encoders=[{grammar / 'shape.yaml'}]", f"student.tokenizer={grammar / 'tokenizer'}"]
    plain = [word for word in words(tmp_path, *given) if "teachers=" not in word]
    with pytest.raises(UserError, match=r"holds other files \('notes.txt'\); give a new folder"):
        finetune(load_config(plain), World(0, 1, torch.device("cpu")))
    for place, message in (
        (tmp_path / "notes.txt", r"notes.txt is a file; give a folder"),
        (tmp_path / "notes.txt" / "run", r"notes.txt/run cannot be made: .*; give another"),
    ):
        with pytest.raises(UserError, match=message):
            finetune(load_config([*plain, f"output_dir={place}"]), World(0, 1, torch.device("cpu")))
