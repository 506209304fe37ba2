"""Configuration: files stacked left to right, words over them, mistakes named."""

import pytest
from small import config

from sead_dist.config.load import load_config, shipped_files
from sead_dist.config.schema import METHOD_KEYS
from sead_dist.config.yaml_text import dump_config
from sead_dist.errors import UserError


def test_files_stack_left_to_right_and_words_come_last(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "task: sst2\noutput_dir: x\nseed: 1\nselection: {fraction: 0.2}"
    )
    (tmp_path / "b.yaml").write_text("seed: 2\nselection: {seed: 9}\n")
    found = load_config(
        [str(tmp_path / "a.yaml"), "num_train_epochs=7", str(tmp_path / "b.yaml"), "seed=3"]
    )
    assert (found.seed, found.num_train_epochs) == (3, 7)
    # a section is laid over, not replaced
    assert (found.selection.fraction, found.selection.seed) == (0.2, 9)


def test_a_shipped_config_is_found_by_name_and_by_its_path():
    by_name = load_config(["sst2", "output_dir=x"])
    assert by_name.task == "sst2"
    assert by_name == load_config(["configs/tasks/sst2.yaml", "output_dir=x"])


def test_shorthands():
    found = config("student=L6-H256-A8", "store=S", "teachers=[a/b,{path: c, weight: 2}]")
    assert (found.student.shape, found.student.path) == ("L6-H256-A8", None)
    assert found.store.path == "S"
    assert [(t.path, t.weight) for t in found.teachers] == [("a/b", 1.0), ("c", 2.0)]


def test_a_glob_of_teachers_is_sorted_and_must_match(tmp_path):
    for name in ("t-2", "t-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "t-3.txt").write_text("a file is not a teacher")
    found = config(f"teachers={tmp_path}/t-*")
    assert [entry.path for entry in found.teachers] == [f"{tmp_path}/t-1", f"{tmp_path}/t-2"]
    with pytest.raises(UserError, match="matches no folder"):
        config(f"teachers={tmp_path}/none-*")


def test_on_and_off_are_words_and_exponents_are_numbers():
    found = config(
        "teacher_validation=off", "learning_rate=1e-3", "selection.split=dev", "deterministic=true"
    )
    assert found.teacher_validation == "off"
    assert found.learning_rate == 0.001
    assert found.selection.split == "dev"
    assert found.deterministic is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("epoch=3", "unknown key 'epoch'; did you mean 'num_train_epochs'"),
        ("selection.fractoin=0.2", "did you mean 'selection.fraction'"),
        ("alpha=1.5", "alpha=1.5"),
        ("temperature=0", "temperature=0"),
        ("placement=everywhere", "placement='everywhere'.*'colocated'"),
        ("output_dir=", "output_dir is not set"),
        (
            "micro_batch_size=3",
            "micro_batch_size=3 does not divide global_batch_size=8.*micro_batch_size=2",
        ),
        ("seed=[1", "the value of seed"),
    ],
)
def test_mistakes_name_the_key_the_value_and_the_fix(given, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(["sst2", "output_dir=x", "global_batch_size=8", given])
    assert "\n" not in str(caught.value)


def test_an_unknown_file_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'sst2'"):
        load_config(["sst3"])


def test_a_broken_file_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: 1\ntask: [\n")
    with pytest.raises(UserError, match=r"bad.yaml, line \d+ is not valid YAML"):
        load_config([str(tmp_path / "bad.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="holds no keys"):
        load_config([str(tmp_path / "list.yaml")])


def test_the_dump_gives_the_same_configuration_again(tmp_path):
    first = config(
        "teachers=[{path: a, labels: [x, y]}]", "teacher_validation=off", "selection.split=dev"
    )
    (tmp_path / "again.yaml").write_text(dump_config(first))
    assert load_config([str(tmp_path / "again.yaml")]) == first


def test_identity_holds_what_decides_the_student_and_not_where_or_how_it_runs():
    base = config().identity()
    free = ["placement=partitioned", "prefetch_rows=5", "save_steps=3", "store=S"]
    free += [
        "eval_steps=2",
        "report_to=tensorboard",
        "data.path=D",
        "save_total_limit=9",
    ]
    assert config(*free, output_dir="elsewhere").identity() == base
    fixed = [
        "seed=5",
        "alpha=0.1",
        "num_train_epochs=9",
        "micro_batch_size=4",
        "selection.fraction=0.3",
    ]
    fixed += ["data.max_train_examples=7", "ensemble=score", "student.shape=s", "precision=bf16"]
    for word in fixed:
        key = word.split("=")[0]
        changed = config(**{key.replace(".", "__"): word.split("=")[1]}).identity()
        assert [name for name in base if base[name] != changed[name]] == [key]


@pytest.mark.parametrize("more", ["student.layers=[0]", "student.path=somewhere"])
def test_a_student_setting_that_would_be_ignored_is_refused(more):
    with pytest.raises(UserError, match="would be ignored; give one of the two"):
        load_config(["task=sst2", "output_dir=o", "student.shape=L6-H256-A8", more])


def test_a_yaml_file_or_a_shipped_name_is_a_shape():
    for given in ("L6-H256-A8", "tiny.yaml"):
        student = load_config(["task=sst2", "output_dir=o", f"student={given}"]).student
        assert (student.path, student.shape) == (None, given)


def test_a_student_named_like_a_shape_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["task=sst2", "output_dir=out"]
    for name in ("L6-H256-A8", "L6-H999-A7"):
        student = load_config([*given, f"student={name}"]).student
        assert (student.shape, student.path) == (name, None)
    (tmp_path / "L6-H999-A7").mkdir()
    assert load_config([*given, "student=L6-H999-A7"]).student.path == "L6-H999-A7"


def test_a_method_lies_over_the_defaults_and_under_everything_else(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("alpha: 0.2\ntemperature: 7\n")
    (tmp_path / "run.yaml").write_text(f"method: {own}\nalpha: 0.4\n")
    found = config(str(tmp_path / "run.yaml"))
    assert (found.alpha, found.temperature, found.method) == (0.4, 7.0, str(own))
    # the last name given counts, and its keys lie under those of files to its left
    found = config(str(tmp_path / "run.yaml"), method="mean")
    assert (found.ensemble, found.alpha, found.temperature) == ("mean_logits", 0.4, 2.0)


def test_a_run_with_teachers_and_no_method_is_sead_and_the_defaults_are_its_keys():
    assert config("teachers=[a,b]").method == "sead"
    assert config("teachers=[a,b]") == config("teachers=[a,b]", method="sead")
    plain, named = config(), config(method="sead")
    assert plain.method is None
    assert [getattr(plain, key) for key in METHOD_KEYS] == [getattr(named, k) for k in METHOD_KEYS]
    # a key of a method makes it one without a name
    assert config("teachers=[a,b]", alpha=0).method is None
    assert config("teachers=[a,b]", method="mean").method == "mean"


def test_the_methods_are_what_their_sources_say():
    found = {
        name: (of.ensemble, of.temperature, of.alpha)
        for name in ("sead", "single", "mean")
        for of in [config(method=name)]
    }
    assert found["sead"] == ("mean_probabilities", 1.0, 0.9)
    assert found["single"] == ("single", 1.0, 0.9)
    assert found["mean"] == ("mean_logits", 2.0, 0.5)


def test_which_student_is_kept_is_no_key_of_a_method(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("final_checkpoint: last\n")
    with pytest.raises(UserError, match="final_checkpoint is not a key of a method"):
        config(method=own)


def test_every_shipped_method_is_a_configuration_of_a_methods_keys():
    for name in shipped_files("methods"):
        assert config(method=name).method == name


def test_an_unknown_method_is_told_the_known_ones():
    with pytest.raises(
        UserError,
        match=r"method=mena is neither a shipped method nor a YAML file; did you mean 'mean'\? known: ",
    ):
        config(method="mena")


def test_a_method_sets_nothing_that_all_methods_share(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("alpha: 0.2\nnum_train_epochs: 9\n")
    with pytest.raises(
        UserError, match="num_train_epochs is not a key of a method; a method's file may set ensem"
    ):
        config(method=own)
