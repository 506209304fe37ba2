"""A person's own loss, ensemble, kind of teacher and kind of task, each added through `plugins`: by
the command line, a resume, a sweep, workers of a pool and the words of a SLURM job."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks import run_ranks
from small import ALONE, model_bytes, read, run_distill, save_teacher, words, write_task

import sead_dist as sd
from sead_dist.cli.commands import attempt_recipe
from sead_dist.cli.grammar import ADJECTIVES, LABELS
from sead_dist.cli.submit import runs_to_submit
from sead_dist.config.load import load_config
from sead_dist.config.registered import ADDED, load_plugins
from sead_dist.errors import UserError
from sead_dist.runs.distillation import distill
from sead_dist.runs.prediction import task_of
from sead_dist.runtime.distributed import StopFlag

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
PLUGINS = Path(__file__).parents[1] / "fixtures" / "plugins"
WORDS = "".join(f"{word}\t{LABELS[of > 0]}\n" for of, words in ADJECTIVES.items() for word in words)


def tone_of(text: str) -> int:
    return sum(of for of, words in ADJECTIVES.items() for word in text.split() if word in words)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Clauses with the label of their adjectives (a tie is negative, for the word list too), once
    more as a task of the kind `graded`; a list of these words, and a model."""
    root = tmp_path_factory.mktemp("plugins")
    data = write_task(root / "data")
    fields = yaml.safe_load((data / "task.yaml").read_text())
    (data / "graded.yaml").write_text(yaml.safe_dump({**fields, "kind": "graded"}))
    near = {**fields, "kind": "near", "metrics": ["closeness"]}
    (data / "near.yaml").write_text(yaml.safe_dump(near))
    (data / "words.tsv").write_text(WORDS)
    for name in ("train", "validation"):
        path = data / f"{name}.tsv"
        texts = [line.split("\t")[0] for line in path.read_text().splitlines()[1:]]
        lines = [f"{text}\t{LABELS[tone_of(text) > 0]}" for text in texts]
        path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    save_teacher(root / "model")
    return data, root / "model"


def own(*names: str) -> str:
    return f"[{','.join(str(PLUGINS / f'{name}.py') for name in names)}]"


def word_list(data: Path) -> str:
    return f"{{kind: word_list, path: {data / 'words.tsv'}}}"


def all_words(task, output: Path, **changes) -> list[str]:
    """A run that uses all four plugins."""
    data, model = task
    keys = {
        "task": data / "graded.yaml",
        "plugins": own("huber", "surest", "word_list", "graded"),
        "loss": "huber",
        "ensemble": "surest",
        **changes,
    }
    return words(data, [model, word_list(data)], output, **keys)


def run(recipe: str, given: list[str]) -> None:
    """As a job does it, and the command line."""
    assert attempt_recipe(recipe, given) is None


EACH = {
    "huber": {"loss": "huber"},
    "surest": {"ensemble": "surest"},
    "word_list": {"teachers": "words"},
    "graded": {"task": "graded.yaml"},
}


@pytest.mark.parametrize("plugin", EACH)
def test_one_file_adds_one_thing(task, tmp_path, plugin):
    data, model = task
    changes = {**EACH[plugin], "plugins": own(plugin)}
    teachers = [model, word_list(data)] if changes.pop("teachers", None) else [model]
    if "task" in changes:
        changes["task"] = data / changes["task"]
    run("distill", words(data, teachers, tmp_path / "run", **changes))
    plain = words(data, [model], tmp_path / "plain")
    run("distill", plain)
    same = model_bytes(tmp_path / "run") == model_bytes(tmp_path / "plain")
    # one model is its own surest; a kind decides of answers, and its loss
    assert same == (plugin == "surest")
    identity = read(tmp_path / "run" / "run.json")["identity"]["config"]
    assert f"plugin {plugin}.py" in identity
    assert (tmp_path / "run" / "plugins" / f"{plugin}.py").is_file()
    manifest = read(tmp_path / "run" / "teacher_manifest.json")
    assert [entry.get("kind") for entry in manifest][1:] == (
        ["word_list"] if plugin == "word_list" else []
    )


def test_a_word_list_teaches_what_its_words_say(task, tmp_path):
    data, _ = task
    given = words(data, [word_list(data)], tmp_path / "run", plugins=own("word_list"))
    # as any teacher it is validated first
    run("distill", [*given, "teacher_validation=fp32", "selection.fraction=0.4"])
    scores = read(tmp_path / "run" / "scores.json")["splits"]["validation"]
    assert scores["teachers"][0]["name"] == "words.tsv"
    assert scores["ensemble"] == scores["teachers"][0]["metrics"]
    # its predictions are kept: a second student asks none
    more = [f"output_dir={tmp_path / 'again'}", "seed=1", "selection.fraction=0.4"]
    run("distill", [*given, *more])
    assert read(tmp_path / "again" / "run_summary.json")["teacher_forwards"] == 0


def test_a_metric_of_a_kind_of_ones_own_has_figures_and_intervals(task, tmp_path):
    data, _ = task
    found = {}
    near = {"plugins": own("word_list", "closeness"), "task": data / "near.yaml"}
    for name, keys in (("near", near), ("plain", {"plugins": own("word_list")})):
        keys |= {"selection__fraction": 0.4, "teacher_validation": "fp32"}
        given = words(data, [word_list(data)], tmp_path / name, **keys)
        run("distill", given)
        found[name] = read(tmp_path / name / "learnable.json")
    assert found["near"]["metric"] == "closeness"
    # of two classes it is what accuracy is
    for key in ("majority", "ensemble", "gap"):
        assert found["near"][key] == pytest.approx(found["plain"][key]), key
    low, high = found["near"]["interval"]
    assert [low, min(high, 1)] == pytest.approx(found["plain"]["interval"])


def stopped_after_one_step(given: list[str]) -> None:
    stop = StopFlag()
    stop.signal = 15
    distill(load_config(given), ALONE, show_table=False, stop=stop)


def test_a_run_is_resumed_with_its_plugins_and_with_no_others(task, tmp_path):
    copies = tmp_path / "own"
    shutil.copytree(PLUGINS, copies)
    paths = ",".join(str(copies / f"{name}.py") for name in EACH)
    run("distill", all_words(task, tmp_path / "whole", plugins=f"[{paths}]"))
    given = all_words(task, tmp_path / "run", plugins=f"[{paths}]")
    stopped_after_one_step(given)
    changed = copies / "huber.py"
    before = changed.read_text()
    changed.write_text(before.replace("mean(-1)", "sum(-1)"))
    with pytest.raises(UserError, match=r"holds another run: plugin huber\.py was '\w+', is '\w+'"):
        load_config(given)
        distill(load_config(given), ALONE)
    changed.write_text(before)
    run("distill", given)
    assert model_bytes(tmp_path / "run") == model_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_directory_is_resumed_and_used_without_the_files_that_made_it(task, tmp_path):
    """In processes of their own, which know nothing of the plugins but what the run keeps."""
    data, _ = task
    copies = tmp_path / "own"
    shutil.copytree(PLUGINS, copies)
    paths = ",".join(str(copies / f"{name}.py") for name in EACH)
    folder = tmp_path / "run"
    given = all_words(task, folder, plugins=f"[{paths}]")
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_plugins as t; "
    script += "t.stopped_after_one_step(sys.argv[2:])"
    here = [str(Path(__file__).parent), *given]
    path = f"{Path(__file__).parents[1]}"
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {script}", *here],
        check=True,
    )
    shutil.rmtree(copies)
    command = [sys.executable, "-m", "sead_dist"]
    subprocess.run([*command, "distill", str(folder / "config.yaml")], check=True)
    assert (folder / "model" / "model.safetensors").is_file()
    moved = folder.rename(tmp_path / "moved")
    out = tmp_path / "answers.jsonl"
    rows = str(data / "validation.tsv")
    subprocess.run([*command, "predict", str(moved), rows, "--output", str(out)], check=True)
    first = json.loads(out.read_text().splitlines()[0])
    assert 0 <= first["grade"] <= 1
    assert sd.Run(moved).config.loss == "huber"
    (answer,) = sd.predict(moved, ["the plot was good"])
    assert set(answer) == {"grade"}


def test_a_sweep_hands_plugins_to_its_runs(task, tmp_path):
    data, model = task
    shape = data / "student.yaml"
    method = tmp_path / "mine.yaml"
    method.write_text("ensemble: surest\nloss: huber\n")
    given = [
        *(w for w in all_words(task, tmp_path / "sweep") if not w.startswith(("task=", "ens", "loss"))),
        f"tasks=[{data / 'graded.yaml'}]",
        f"methods=[finetune,{method}]",
        "seeds=1",
    ]  # fmt: skip
    assert shape.is_file() or model.is_dir()
    run("sweep", given)
    name = yaml.safe_load((data / "graded.yaml").read_text())["name"]
    for method_name in ("finetune", "mine"):
        folder = tmp_path / "sweep" / name / method_name / "seed-0"
        assert read(folder / "run_summary.json")["finished"]
        assert (folder / "plugins" / "huber.py").is_file()


def test_workers_of_a_pool_ask_a_plugins_teacher(task, tmp_path, capfd):
    given = [*all_words(task, tmp_path / "run"), "placement=pool"]
    run("teach 1/1", given)
    said = capfd.readouterr().out
    assert "worker 1 of 1: " in said
    assert "this worker has computed" in said
    run("distill", given)
    run("distill", all_words(task, tmp_path / "alone", store=tmp_path / "other"))
    assert model_bytes(tmp_path / "run") == model_bytes(tmp_path / "alone")


def test_every_rank_runs_the_plugins(task, tmp_path):
    given = all_words(task, tmp_path / "run")
    run_ranks(2, tmp_path / "ranks", run_distill, given)
    run("distill", all_words(task, tmp_path / "alone"))
    two, one = (read(tmp_path / name / "scores.json")["splits"] for name in ("run", "alone"))
    # students of one and of two ranks differ in a last digit, what teachers say in none
    for key in ("teachers", "ensemble"):
        assert two["validation"][key] == one["validation"][key]


@pytest.mark.slow
def test_a_submitted_job_runs_with_the_plugins(task, tmp_path):
    """A job's process has nothing but the words."""
    given = all_words(task, tmp_path / "run")
    _, (one,) = runs_to_submit(given, None)
    script = "import sys; from sead_dist.cli.commands import attempt_recipe; "
    script += "raise SystemExit(attempt_recipe(sys.argv[1], sys.argv[2:]))"
    job = [sys.executable, "-c", script, one.recipe, *one.words]
    subprocess.run(job, check=True)
    run("distill", all_words(task, tmp_path / "alone"))
    assert model_bytes(tmp_path / "run") == model_bytes(tmp_path / "alone")


def test_each_example_of_the_page_is_a_plugin_that_registers_one_thing(tmp_path):
    for plugin in [plugin for plugin in ADDED.files if plugin]:
        ADDED.forget(plugin)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    found = []
    for number, block in enumerate(blocks):
        path = tmp_path / f"block{number}.py"
        path.write_text(block)
        before = {what: [*names] for what, names in ADDED.owners.items()}
        load_plugins([str(path)])
        added = {what: set(names) - set(before[what]) for what, names in ADDED.owners.items()}
        found.append([what for what, new in added.items() for _ in new])
    ensembles, kinds = [["ensemble"]] * 2, [["kind of task"]] * 2
    assert found == [["loss"], *ensembles, ["kind of teacher"], *kinds]
    for plugin in [plugin for plugin in ADDED.files if plugin]:
        ADDED.forget(plugin)


def test_the_pages_weighting_by_size_gets_the_teachers_sizes_in_a_run(task, tmp_path):
    data, model = task
    (block,) = re.findall(
        r"```python\n((?:(?!```).)*BySize.*?)```", PAGE.read_text("utf-8"), re.DOTALL
    )
    (tmp_path / "by_size.py").write_text(block)
    larger = save_teacher(tmp_path / "larger", num_hidden_layers=3)
    keys = {"plugins": f"[{tmp_path / 'by_size.py'}]", "ensemble": "by_size"}
    run("distill", words(data, [model, larger], tmp_path / "run", **keys))
    of_one, of_three = read(tmp_path / "run" / "ensemble.json")["weights"]
    assert of_one + of_three == pytest.approx(1)
    # three layers, each larger than the rest of the model
    assert of_three > 1.5 * of_one > 0


def refused(match: str, *paths: Path) -> None:
    with pytest.raises(UserError, match=match) as told:
        load_plugins([str(path) for path in paths])
    assert "\n" not in str(told.value)


def test_what_is_wrong_with_a_plugin_is_told_in_one_line(tmp_path):
    mine = tmp_path / "mine.py"
    refused(r"plugins: .*mine\.py does not exist", mine)
    mine.write_text("import torch\n\nraise ValueError('one\\ntwo')\n")
    refused(r"mine\.py cannot be run: ValueError: one in line 3; correct the file", mine)
    mine.write_text("def f(:\n")
    refused(r"mine\.py cannot be run: SyntaxError: .* in line 1", mine)
    mine.write_text("import sead_dist as sd\nsd.register_loss('kl', None)\n")
    refused(r"mine\.py: the loss 'kl' exists already \(built in\)", mine)
    mine.write_text("import sead_dist as sd\nsd.register_loss('a b', None)\n")
    refused(r"mine\.py: 'a b' is not a name of a loss", mine)
    mine.write_text("import sead_dist as sd\nsd.register_loss('half', None)\n")
    refused(r"mine\.py: the loss 'half' is of type NoneType \(None\); give a function", mine)
    mine.write_text("import sead_dist as sd\nsd.register_loss('half', len)\n1 / 0\n")
    refused(r"mine\.py cannot be run: ZeroDivisionError", mine)
    # what it had registered by then is free again
    mine.write_text("import sead_dist as sd\nsd.register_loss('half', len)\n")
    load_plugins([str(mine)])
    other = tmp_path / "other.py"
    other.write_text("import sead_dist as sd\nsd.register_loss('half', len)  # another\n")
    refused(r"the loss 'half' exists already \(registered by .*mine\.py\)", other)
    refused(r"plugins has two files named 'mine\.py'", mine, mine)


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        (
            "from sead_dist.data.task_files import TaskSpec",
            "No module named 'sead_dist.data.task_files'",
            "correct the import: docs/architecture.md lists the modules of this version",
        ),
        (
            "import sead_dist.sweep.significance",
            "No module named 'sead_dist.sweep.significance'",
            "correct the import: docs/architecture.md lists the modules of this version",
        ),
        (
            "from sead_dist.data.resampling import units_of",
            "No module named 'sead_dist.data.resampling'",
            "correct the import: docs/architecture.md lists the modules of this version",
        ),
        (
            "from sead_dist.data.tasks import read_task",
            "cannot import name 'read_task' from 'sead_dist.data.tasks'",
            "correct the import: docs/architecture.md lists the modules of this version",
        ),
        (
            "import no_such_package.part",
            "No module named 'no_such_package'",
            "install no_such_package for this Python, or put its code into the plugin",
        ),
        (
            "from numpy import no_such_name",
            "cannot import name 'no_such_name' from 'numpy'",
            "correct the import, or install another version of numpy",
        ),
    ],
)
def test_a_plugin_that_imports_what_is_not_there_is_told_with_the_module_and_the_fix(
    tmp_path, line, what, fix
):
    mine = tmp_path / "mine.py"
    mine.write_text(f"import torch\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        load_plugins([str(mine)])
    said = str(caught.value)
    assert said.startswith(f"plugin {mine} cannot be run: ")
    assert what in said
    assert said.endswith(f" in line 3; {fix}")
    assert "\n" not in said


def test_a_name_that_no_plugin_registers_is_refused_with_those_that_are_known(task, tmp_path):
    data, model = task
    given = words(data, [model], tmp_path / "run")
    with pytest.raises(UserError, match="loss='hubert': input should be 'auto', 'kl', 'mse'"):
        load_config([*given, "loss=hubert"])
    entry = f"teachers=[{{kind: llm, path: {model}}}]"
    with pytest.raises(UserError, match=r"teachers\.0\.kind='llm': input should be 'model'"):
        load_config([*given, entry])


def test_code_in_a_folder_that_is_no_run_is_not_run(tmp_path):
    folder = tmp_path / "downloaded"
    (folder / "plugins").mkdir(parents=True)
    (folder / "plugins" / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    task_of(str(folder), "sst2")
    assert not (tmp_path / "ran").exists()


def test_a_plugin_that_is_not_the_one_that_ran_is_refused(tmp_path):
    run = tmp_path / "run"
    (run / "plugins").mkdir(parents=True)
    (run / "plugins" / "x.py").write_text("raise SystemExit")
    (run / "run.json").write_text('{"identity": {"config": {"plugin x.py": "0123456789abcdef"}}}')
    with pytest.raises(UserError, match="is not the file that the run used; restore it"):
        task_of(str(run), "sst2")
