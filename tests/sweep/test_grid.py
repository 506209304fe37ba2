"""A sweep's words become a list of runs; what is wrong with them is one line."""

from pathlib import Path

import pytest
from small import student_shape

from sead_dist.config.load import load_config, shipped_files
from sead_dist.errors import UserError
from sead_dist.sweep.grid import is_sweep, make_grid

GIVEN = ["data.path=data/{task}", "student=L6-H256-A8", "output_dir=out"]
ENCODERS = "encoders=[L12-H384-A12,L6-H384-A12]"


def grid(*words):
    return make_grid([*GIVEN, *words])


def of(found, task, method):
    return [unit.config for unit in found.units if (unit.task, unit.method) == (task, method)]


def test_teachers_come_first_and_every_student_needs_those_of_its_task():
    found = grid("tasks=[cola,rte]", "methods=[finetune,mean]", "seeds=2", ENCODERS)
    assert [str(unit.folder) for unit in found.units] == [
        *(f"out/{task}/teachers/teacher-{n}" for task in ("cola", "rte") for n in (0, 1)),
        *(
            f"out/{task}/{method}/seed-{seed}"
            for task in ("cola", "rte")
            for seed in (0, 1)
            for method in ("finetune", "mean")
        ),
    ]
    made = {
        task: [Path(f"out/{task}/teachers/teacher-{n}") for n in (0, 1)] for task in found.tasks
    }
    assert all(
        list(u.needs) == ([] if u.method == "teachers" else made[u.task]) for u in found.units
    )


def test_teachers_are_made_only_for_methods_that_read_them():
    def made(*words):
        return [unit.title for unit in grid(*words, "seeds=1", ENCODERS).units][:1]

    own, both = "student.tokenizer=words", "tasks=[cola,rte]"
    teachers = ["cola teachers teacher-0"]
    assert made("tasks=[cola]", "methods=[finetune]", own) == ["cola finetune seed-0"]
    assert made("tasks=[cola]", "methods=[finetune,mean]", own) == teachers
    # a student of a shape has their tokeniser, and copies have their mask token
    assert made("tasks=[cola]", "methods=[finetune]") == teachers
    copies = "augment={copies: 1, gold_labels: true}"
    assert made("tasks=[cola]", "methods=[finetune]", own, copies) == teachers
    # for each task
    here = "per_task={cola: {methods: {mean: null}}}"
    found = grid(both, "methods=[finetune,mean]", "seeds=1", ENCODERS, own, here)
    assert found.unread == ("cola",)
    assert [unit.title for unit in found.units if unit.method == "teachers"] == [
        *("rte teachers teacher-0", "rte teachers teacher-1")
    ]
    assert not of(found, "cola", "finetune")[0].teachers


def test_an_arm_may_have_keys_of_its_own_on_one_task_or_be_left_out_there():
    arms = "methods=[finetune,mean,{name: long, method: mean, learning_rate: 3.0e-4, alpha: 0.3}]"
    per_task = (
        "per_task={rte: {learning_rate: 2.0e-4, methods: {finetune: {learning_rate: 1.0e-5}, "
    )
    per_task += "mean: null, long: {learning_rate: 5.0e-5}}}}"
    found = grid("tasks=[cola,rte]", arms, "seeds=1", ENCODERS, "learning_rate=1e-4", per_task)
    rates = {(unit.task, unit.method): unit.config.learning_rate for unit in found.units}
    assert [rates["cola", arm] for arm in ("finetune", "mean", "long")] == [1e-4, 1e-4, 3e-4]
    assert (rates["rte", "finetune"], rates["rte", "long"]) == (1e-5, 5e-5)
    assert [of(found, task, "long")[0].alpha for task in ("cola", "rte")] == [0.3, 0.3]
    assert found.unfit == {("rte", "mean"): "per_task leaves it out"}
    assert not of(found, "rte", "mean")


def test_students_are_told_apart_by_task_method_and_seed_alone(monkeypatch):
    monkeypatch.delenv("SEAD_DIST_STORE")
    found = grid("tasks=[cola,rte]", "methods=[finetune,mean]", "seeds=[3,7]", ENCODERS)
    (first, second), (mean, _) = of(found, "rte", "finetune"), of(found, "rte", "mean")
    assert (first.seed, second.seed) == (3, 7)
    assert first.data.path == "data/rte"
    assert first.student == mean.student
    assert [entry.path for entry in first.teachers] == [entry.path for entry in mean.teachers]
    assert [first.ensemble, mean.ensemble] == ["none", "mean_logits"]
    # all of a sweep's runs read one store
    assert {unit.config.store.path for unit in found.units[-8:]} == {"out/store"}
    # a task's shipped configuration counts, as it does for `distill cola`
    assert (of(found, "cola", "mean")[0].max_length, mean.max_length) == (64, 128)


def test_the_store_that_the_environment_names_is_the_sweeps_too(monkeypatch, tmp_path):
    monkeypatch.setenv("SEAD_DIST_STORE", str(tmp_path))
    found = grid("tasks=[cola]", "methods=[mean]", "seeds=1", ENCODERS)
    # the runs themselves ask the environment
    assert of(found, "cola", "mean")[0].store.path is None
    found = grid("tasks=[cola]", "methods=[mean]", "seeds=1", ENCODERS, "store=own")
    assert of(found, "cola", "mean")[0].store.path == "own"


def test_a_task_has_keys_of_its_own_and_so_has_fine_tuning():
    found = grid(
        *("tasks=[cola,rte]", "methods=[mean]", "seeds=1", ENCODERS, "num_train_epochs=2"),
        *(
            "finetune={num_train_epochs: 9, learning_rate: 1e-3, seed: 40}",
            "per_task.rte.num_train_epochs=4",
            "alpha=0.1",
        ),
    )
    assert of(found, "cola", "mean")[0].num_train_epochs == 2
    assert of(found, "rte", "mean")[0].num_train_epochs == 4
    teachers = of(found, "rte", "teachers")
    assert [(t.num_train_epochs, t.learning_rate, t.seed) for t in teachers] == [
        (9, 1e-3, 40),
        (9, 1e-3, 41),
    ]


def test_what_students_ask_of_teachers_does_not_change_the_teachers():
    words = ["tasks=[cola]", "methods=[mean]", "seeds=1", ENCODERS]
    asked = ["alpha=0.1", "temperature=9", "teacher_column=column", "student.layers=null"]
    before, after = grid(*words), grid(*words, *asked)
    assert of(before, "cola", "teachers") == of(after, "cola", "teachers")
    assert of(before, "cola", "mean") != of(after, "cola", "mean")


def test_unlabelled_text_is_for_students_that_ask_teachers_alone():
    words = ["tasks=[cola]", "methods=[finetune,mean]", "seeds=1", ENCODERS]
    found = grid(*words, "unlabeled.path={task}.tsv", "unlabeled.ratio=2")
    given = {unit.method: unit.config.unlabeled for unit in found.units}
    assert (given["mean"].path, given["mean"].ratio) == ("cola.tsv", 2)
    assert {(given[m].path, given[m].ratio) for m in ("finetune", "teachers")} == {(None, None)}


def test_the_students_layers_are_not_the_teachers(tmp_path):
    words = ["student=DIR", "student.layers=[1,3]", "encoders=[DIR]", "tasks=cola", "methods=mean"]
    found = make_grid([*words, "seeds=1", "output_dir=out"])
    assert of(found, "cola", "teachers")[0].student.layers is None
    assert of(found, "cola", "mean")[0].student.layers == [1, 3]
    found = make_grid([*words, "seeds=1", "output_dir=out", "finetune.student.layers=[0]"])
    assert of(found, "cola", "teachers")[0].student.layers == [0]


def test_keys_of_a_sweep_may_stand_in_a_file_and_an_own_method_too(tmp_path):
    own = tmp_path / "cold.yaml"
    own.write_text("ensemble: mean_logits\ntemperature: 0.5\n")
    file = tmp_path / "sweep.yaml"
    file.write_text(f"tasks: [cola]\nmethods: [mean, {own}]\nseeds: 3\nteachers: [T]\n")
    found = grid(str(file), "seeds=2")
    assert (found.methods, found.seeds) == (["mean", "cold"], [0, 1])
    (cold, _) = of(found, "cola", "cold")
    assert (cold.temperature, cold.output_dir) == (0.5, "out/cola/cold/seed-0")
    assert [entry.path for entry in cold.teachers] == ["T"]
    assert not found.own_teachers


def test_folds_are_the_teachers_and_no_students():
    found = grid("tasks=[cola]", "methods=[finetune,mean]", "seeds=1", ENCODERS, "folds=2")
    teachers = of(found, "cola", "teachers")
    assert {(config.folds, config.fold) for config in teachers} >= {(2, 0), (2, 1)}
    students = [*of(found, "cola", "finetune"), *of(found, "cola", "mean")]
    assert {config.folds for config in students} == {None}


def test_an_arm_is_a_method_with_keys_of_its_own():
    arms = "methods=[mean,{name: warm, method: mean, temperature: 9, student: {layers: [1]}}]"
    found = grid("tasks=[cola]", arms, "seeds=1", ENCODERS, "temperature=3", "student=DIR")
    assert found.methods == ["mean", "warm"]
    (mean,), (warm,) = of(found, "cola", "mean"), of(found, "cola", "warm")
    assert (mean.temperature, warm.temperature) == (3, 9)
    assert (mean.student.layers, warm.student.layers) == (None, [1])
    assert (warm.ensemble, warm.output_dir) == ("mean_logits", "out/cola/warm/seed-0")
    # the teachers' fine-tuning knows nothing of it
    assert {
        t.student.layers and tuple(t.student.layers) for t in of(found, "cola", "teachers")
    } == {None}


def test_an_arm_may_have_steps_of_its_own_where_they_are_not_equal():
    arms = "methods=[mean,{name: long, method: mean, max_steps: 900, unlabeled: {path: null}}]"
    found = grid("tasks=[cola]", arms, "seeds=1", ENCODERS, "equal_steps=off")
    assert [config.max_steps for config in of(found, "cola", "long")] == [900]


def test_arms_are_compared_with_the_one_that_is_named():
    words = ["tasks=[cola]", "seeds=1", ENCODERS]
    assert grid(*words, "methods=[finetune,mean]").reference == "finetune"
    assert grid(*words, "methods=[single,mean]").reference is None
    arms = "methods=[mean,{name: control, method: finetune}]"
    assert grid(*words, arms, "reference=control").reference == "control"


def test_by_default_every_shipped_method_and_what_does_not_apply_is_marked():
    found = grid("tasks=[stsb,cola]", "seeds=1", "teachers=[a,b]")
    assert found.methods[0] == "finetune"
    assert sorted(found.methods) == list(shipped_files("methods"))
    assert "needs classes" in found.unfit["stsb", "confidence"]
    assert "needs teacher_column=COLUMN" in found.unfit["cola", "routed"]
    ran = {(unit.task, unit.method) for unit in found.units}
    assert ran == {(t, m) for t in ("stsb", "cola") for m in found.methods} - set(found.unfit)


def test_a_sweep_is_told_from_a_run():
    assert is_sweep(["cola", "methods=[mean]"])
    assert not is_sweep(["cola", "seed=1"])
    with pytest.raises(UserError, match="unknown key 'tasks'"):
        load_config([*GIVEN, "task=cola", "tasks=[cola]"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tasks=[colla]"], r"unknown task 'colla'; did you mean 'cola'\? known: cola, sst2"),
        (
            ["methods=[meam]"],
            r"method=meam is neither a shipped method nor .*; did you mean 'mean'\? known: ",
        ),
        (["methods=[mean,mean]"], "methods names 'mean' twice"),
        (["methods=[report.yaml]"], "methods: 'report' is a folder that the sweep needs"),
        (["tasks=[cola,cola]"], "tasks names 'cola' twice"),
        (["tasks=[]"], r"tasks=\[\]"),
        (["tasks=null"], "tasks is not set"),
        (
            ["tasks=null", "task=t.yaml"],
            r"task=t.yaml is a key of a single run, .*; give tasks=\[t.yaml\]",
        ),
        (["equal_steps=maybe"], "equal_steps='maybe'"),
        (
            ["methods=[finetune]", "unlabeled.path=more.tsv"],
            r"unlabeled.path=more.tsv: unlabelled .* no method of this sweep has any; leave",
        ),
        (["finetune.unlabeled.path=more.tsv"], "unlabeled.path=more.tsv: .*finetune uses none"),
        (["seeds=0"], r"seeds=0 is not a number of seeds .* 1000; give how many \(seeds=5\), or"),
        (["seeds=[]"], r"seeds=\[\] is not a number of seeds"),
        (["seeds=two"], r"seeds=two is not a number of seeds"),
        (["method=sead"], r"method=sead is a key of a single run, .*; give methods=\[sead\]"),
        (["seed=3"], r"seed=3 is a key of a single run, .*; give seeds=\[3\]"),
        (["seeds=[1,1]"], "seeds names '1' twice"),
        (
            ["methods=[{name: a, method: mean, max_steps: 9}]"],
            "'a' sets max_steps, and equal_.*=off",
        ),
        (
            ["methods=[{name: a, method: mean, early_stopping_patience: 2}]"],
            "'a' sets early_stopping_patience, and equal_.*=off",
        ),
        (["methods=[{name: a, alpha: 1}]"], "the arm 'a' has no method; give {name: NAME, method"),
        (
            ["methods=[{name: a, metod: mean}]"],
            "'metod' is not a key, and the arm 'a' has no method",
        ),
        (["reference=sead"], "reference=sead is not an arm of this sweep; known: mean"),
        (["methods=[{name: a/b, method: mean}]"], "the arm's name 'a/b' cannot be a folder's"),
        (["methods=[{name: 3, method: mean}]"], "the arm's name 3 cannot be a folder's"),
        (["methods=[{name: report, method: mean}]"], "'report' is a folder that the sweep needs"),
        (["methods=[mean,{method: mean, alpha: 1}]"], "methods names 'mean' twice"),
        (
            ["methods=[{name: a, method: mean, seed: 3}]"],
            "'a' sets seed, which is the same for all",
        ),
        (
            ["methods=[{name: a, method: mean, alfa: 1}]"],
            "unknown key 'alfa'; did you mean 'alpha'",
        ),
        (["reference=meen"], "reference=meen is not an arm of this sweep; did you mean 'mean'"),
        (["keep_models=never"], "keep_models='never'"),
        (["jobs=0"], "jobs=0"),
        (["seeds=[-1]"], "seeds.0=-1"),
        (
            ["per_task.cb.num_train_epochs=3"],
            "per_task: 'cb' is not a task of this sweep; known: cola",
        ),
        (
            ["per_task.cola.methods={meen: null}"],
            "per_task.cola.methods: 'meen' is not an arm of this sweep; did you mean 'mean'",
        ),
        (["per_task.cola.methods={mean: 3}"], "mean=3 has no keys; give {KEY: VALUE}, or null"),
        (["per_task.cola.methods=[mean]"], r"is not a list of arms with keys; give \{ARM: "),
        (
            ["per_task.cola.methods={mean: {seed: 3}}"],
            "per_task.cola.methods: the arm 'mean' sets seed, which is the same for all",
        ),
        (
            ["per_task.cola.methods={mean: {max_steps: 3}}"],
            "'mean' sets max_steps, and equal_.*off",
        ),
        (["per_task.cola.methods={mean: null}"], "no method can be run: per_task leaves it out"),
        (["per_task.cola.epohs=3"], "unknown key 'epohs'; did you mean 'num_train_epochs'"),
        (["finetune.epohs=3"], "unknown key 'epohs'; did you mean 'num_train_epochs'"),
        (["epohs=3"], "unknown key 'epohs'; did you mean 'num_train_epochs'"),
        (["teachers=[t]"], "teachers and encoders are both given"),
        (["encoders=[]"], "method mean needs teachers; give encoders="),
        (["tasks=[cola,rte]", "output_dir=out/{task}"], "give the same for all tasks"),
        (
            ["tasks=[stsb]", "methods=[entropy]"],
            "no method can be run: ensemble=entropy needs classes",
        ),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(words, line):
    with pytest.raises(UserError, match=line) as error:
        grid("tasks=[cola]", "methods=[mean]", ENCODERS, *words)
    assert "\n" not in str(error.value)


def test_tasks_of_ones_own_are_named_by_their_files(tmp_path):
    for name in ("one", "two"):
        text = f"name: {name}\ntext_a: '{{text}}'\nlabels: [a, b]\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    files = f"[{tmp_path / 'one.yaml'},{tmp_path / 'two.yaml'}]"
    shape = student_shape(tmp_path)
    found = grid(f"tasks={files}", "methods=finetune", "seeds=1", f"student={shape}")
    assert [unit.config.data.path for unit in found.units] == ["data/one", "data/two"]
    assert [str(unit.folder) for unit in found.units] == [
        "out/one/finetune/seed-0",
        "out/two/finetune/seed-0",
    ]
