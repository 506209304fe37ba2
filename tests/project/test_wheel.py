"""The wheel is whole: installed without a checkout it has its configs, templates and licence."""

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "sead_dist", "configs")


def run(*words, cwd, **env):
    # the tests' own path must not lend the checkout to the process
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in env.items()}},
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout; with the setuptools at hand, so
    that no network is needed."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy]
    done = run(*build, cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder as pip would leave it: the wheel unpacked, no checkout near."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def dist_info(site):
    (folder,) = site.glob("sead_dist-*.dist-info")
    return folder


def shipped_files(pattern, folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}


def test_wheel_holds_every_module_config_template_and_the_licence(site):
    assert shipped_files("*.py", site / "sead_dist") == shipped_files("*.py", ROOT / "sead_dist")
    configs = shipped_files("*.yaml", site / "sead_dist" / "configs")
    assert configs == shipped_files("*.yaml", ROOT / "configs")
    zero = shipped_files("*.json", site / "sead_dist" / "configs")
    assert zero == shipped_files("*.json", ROOT / "configs")
    assert "deepspeed/zero2.json" in zero
    assert {"base.yaml", "tasks/sst2.yaml", "students/L6-H256-A8.yaml"} <= configs
    assert shipped_files("*.j2", site) == {
        f"sead_dist/reporting/templates/{path.name}"
        for path in (ROOT / "sead_dist/reporting/templates").glob("*.j2")
    }
    assert (site / "sead_dist" / "py.typed").is_file()
    assert (dist_info(site) / "licenses" / "LICENSE").read_bytes() == (
        ROOT / "LICENSE"
    ).read_bytes()


def test_wheel_holds_nothing_else(site):
    assert {path.name for path in site.iterdir()} == {"sead_dist", dist_info(site).name}


def test_metadata_names_requirements_extras_licence_and_command(site):
    metadata = email.message_from_string((dist_info(site) / "METADATA").read_text("utf-8"))
    required = metadata.get_all("Requires-Dist")
    # no index, no local version: a CUDA user gets the CUDA build from the same line
    assert [line for line in required if re.match(r"torch\b", line)] == ["torch<2.14,>=2.6"]
    extras = {"tensorboard", "deepspeed", "quantize", "onnx", "browser", "benchmark", "dev"}
    extras |= {"gguf", "peft", "sentencepiece", "tiktoken"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert any(line.startswith("pytest>") and 'extra == "dev"' in line for line in required)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# sead_dist")
    commands = configparser.ConfigParser()
    commands.read(dist_info(site) / "entry_points.txt")
    assert commands["console_scripts"]["sead-dist"] == "sead_dist.cli.commands:main"


def test_constraints_pin_every_requirement_to_a_public_version(site):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    assert pins["torch"].replace(".", "").isdigit()  # no +cpu
    metadata = email.message_from_string((dist_info(site) / "METADATA").read_text("utf-8"))
    for line in metadata.get_all("Requires-Dist"):
        requirement, _, extra = line.partition(";")
        name = requirement.strip()
        for sign in "<>=! ":
            name = name.partition(sign)[0]
        if "benchmark" not in extra:
            assert name.lower().replace("_", "-") in pins, line


@pytest.mark.slow
def test_unpacked_wheel_finds_its_own_configs_by_name(site, tmp_path):
    where = "import sead_dist.config.load as c; print(c.config_folder())"
    done = run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=site)
    assert done.stdout.strip() == str(site / "sead_dist" / "configs")
    words = ["distill", "sst2", "data.path=.", "student=L6-H256-A8", "output_dir=run"]
    done = run(
        sys.executable, "-m", "sead_dist", *words, "teachers=./none", cwd=tmp_path, PYTHONPATH=site
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    # sst2.yaml and L6-H256-A8.yaml were found: what is missing is the data or the teacher
    assert "config" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_distils_in_an_empty_environment(wheel, grammar, teachers, tmp_path):
    """Needs pip's index, or the packages in its cache."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    pip = [home / "bin" / "python", "-m", "pip", "install", "--quiet"]
    done = run(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(home / "bin" / "python", "-m", "pip", "check", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    command = home / "bin" / "sead-dist"
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "distill" in done.stdout
    where = "import sead_dist; print(sead_dist.__file__)"
    done = run(home / "bin" / "python", "-c", where, cwd=tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(home)
    done = run(
        command,
        "distill",
        f"task={grammar / 'task.yaml'}",
        f"data.path={grammar}",
        f"teachers=[{teachers[0]},{teachers[1]}]",
        f"student.shape={grammar / 'shape.yaml'}",
        "store=store",
        "output_dir=run",
        "max_steps=3",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "pipeline_tag: text-classification" in (tmp_path / "run" / "README.md").read_text(
        "utf-8"
    )
