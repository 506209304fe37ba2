"""Uploading to the hub. None can be reached here: a small HTTP server on this machine answers the
calls that huggingface_hub makes, and every test that meets it is named after it."""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from small import ALONE

from sead_dist.cli.commands import main
from sead_dist.cli.submit import runs_to_submit
from sead_dist.config.load import load_config
from sead_dist.errors import RunError, UserError
from sead_dist.planning.table import plan
from sead_dist.reporting.hub import check_push, check_push_here, push_run
from sead_dist.runs.distillation import finetune
from sead_dist.runs.onnx_export import export_onnx
from sead_dist.runtime.distributed import World
from sead_dist.sweep.grid import make_grid

TOKEN = "hf_QwErTyUiOpAsDfGhJk"


class StandInHub(BaseHTTPRequestHandler):
    """whoami, making a repository, and a commit with small files in it and large ones (*.safetensors)
    sent before, as LFS does. What came lies in `server.repos[id][path]`."""

    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        self.send_response(status)
        data = json.dumps(body).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/whoami-v2":
            account = {"type": "user", "name": "somebody", "orgs": [{"name": "lab"}]}
            self.answer({**account, "auth": {"accessToken": {"role": self.server.role}}})
        else:
            self.answer({"error": "not found"}, 404)

    def do_PUT(self):
        data = self.body()
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_POST(self):
        data = self.body()
        self.server.asked.append(self.path)
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            wish = json.loads(data)
            self.server.wishes.append(wish)
            name = f"{wish.get('organization') or 'somebody'}/{wish['name']}"
            self.answer({"url": f"{address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(data)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{address}/put/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path and not self.server.refuses:
            repo = self.path.removeprefix("/api/models/").split("/commit/")[0]
            held = self.server.repos.setdefault(repo, {})
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    held[value["path"]] = self.server.large[value["oid"]]
            self.answer({"commitUrl": f"{address}/{repo}/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": f"no room for it, says {TOKEN}"}, 403)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in hub at work, which huggingface_hub in this process takes for the real one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.asked, server.wishes, server.repos, server.large = [], [], {}, {}
    server.role, server.refuses = "write", False
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_finished_run_is_uploaded_whole_to_a_stand_in_hub(hub, words, distil, tmp_path, capsys):
    run = tmp_path / "run"
    given = words(run, "max_steps=2", "push_to_hub=true", "hub_private_repo=true")
    distil(given)
    name = "somebody/sead-shape-grammar"
    assert f"uploaded to {constants.ENDPOINT}/{name}\n" in capsys.readouterr().out
    assert hub.wishes[0]["visibility"] == "private"
    ours = {
        path.relative_to(run / "model").as_posix(): path.read_bytes()
        for path in (run / "model").rglob("*")
        if path.is_file()
    }
    assert hub.repos[name] == ours
    assert {"README.md", "model.safetensors", "plots/loss.png"} <= set(ours)
    for path, data in ours.items():
        assert str(tmp_path.parent).encode() not in data, path
    # the same line again does nothing, and asks nothing
    asked = len(hub.asked)
    distil(given)
    assert "nothing to do" in capsys.readouterr().out
    assert len(hub.asked) == asked


def test_a_run_that_was_not_uploaded_is_uploaded_to_a_stand_in_hub_by_the_same_command(
    hub, words, distil, tmp_path, capsys
):
    run = tmp_path / "run"
    hub.refuses = True
    given = words(run, "max_steps=2", "push_to_hub=true", "hub_model_id=lab/film")
    distil(given)
    assert "lab/film" not in hub.repos
    hub.refuses = False
    distil(given)
    said = capsys.readouterr().out
    assert "nothing to do" in said
    assert f"uploaded to {constants.ENDPOINT}/lab/film" in said
    assert "model.safetensors" in hub.repos["lab/film"]
    asked = len(hub.asked)
    distil(given)
    assert len(hub.asked) == asked


def test_a_run_is_finished_though_a_stand_in_hub_refuses_it(hub, words, distil, tmp_path, capsys):
    run = tmp_path / "run"
    hub.refuses = True
    distil(words(run, "max_steps=2", "push_to_hub=true", "hub_model_id=lab/film"))
    assert json.loads((run / "run_summary.json").read_text())["finished"]
    said = capsys.readouterr().out
    assert "the run is finished, but its upload failed: HfHubHTTPError" in said
    assert f"no room for it, says [removed]; upload it later: sead-dist push {run}\n" in said
    assert TOKEN not in said + (run / "log.txt").read_text()
    with pytest.raises(RunError, match=r"upload of .* failed: .*no room for it, says \[removed\]"):
        push_run(run, None, None)
    hub.refuses = False
    main(["push", str(run)])
    assert "model.safetensors" in hub.repos["lab/film"]
    assert capsys.readouterr().out == f"uploaded to {constants.ENDPOINT}/lab/film\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"offline": True}, r"cannot reach the hub at http://127\S+: HF_HUB_OFFLINE is set"),
        ({"endpoint": "http://127.0.0.1:9"}, "cannot reach the hub at http://127.0.0.1:9: Conn"),
        ({"token": "hf_AnotherTokenOfSomebody"}, "does not accept the token: "),
        ({"token": ""}, "there is no token of the hub, and an upload needs one"),
        ({"role": "read"}, "the token of somebody permits reading only"),
        (
            {"repo": "other/x"},
            "hub_model_id=other/x has .* other, .* can write for somebody, lab; give",
        ),
        ({"repo": "a/b/c"}, "hub_model_id=a/b/c is not the name of a repository: HFVal"),
    ],
)
def test_what_a_stand_in_hub_will_refuse_is_told_at_once(hub, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", change.get("offline", False))
    monkeypatch.setattr(constants, "ENDPOINT", change.get("endpoint", constants.ENDPOINT))
    monkeypatch.setenv("HF_TOKEN", change.get("token", TOKEN))
    hub.role = change.get("role", "write")
    with pytest.raises(UserError, match=said) as error:
        check_push(change.get("repo", "lab/x"))
    assert "upload later: sead-dist push RUN" in str(error.value) or "repo" in change
    assert "hf_" not in str(error.value)


@pytest.mark.parametrize("name", ["HF_OIDC_RESOURCE", "HF_TOKEN_PATH"])
def test_a_token_that_cannot_be_read_is_told_in_one_line_and_no_plan_reads_it(
    hub, tmp_path, monkeypatch, name
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # a folder, or a pipeline that has no token to give
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if name == "HF_OIDC_RESOURCE":
        monkeypatch.setenv(name, "somebody/film")
    else:
        (tmp_path / "none").mkdir()
    check_push_here("lab/x")
    with pytest.raises(
        UserError, match=r"^the token of the hub cannot be read: .*; run hf auth login"
    ):
        check_push("lab/x")
    assert hub.asked == []


def test_push_does_not_advise_itself(finished):
    with pytest.raises(UserError, match=r"unset it, then give the same command again$"):
        push_run(finished, None, None)


def test_a_run_without_a_token_ends_before_any_work(words, distil, tmp_path):
    with pytest.raises(UserError, match=r"cannot reach the hub .*HF_HUB_OFFLINE is set"):
        distil(words(tmp_path / "run", "push_to_hub=true"))
    assert not (tmp_path / "run").exists()


def test_a_run_asks_a_stand_in_hub_before_any_work_and_a_plan_asks_nothing(
    hub, words, distil, tmp_path, monkeypatch
):
    given = words(tmp_path / "run", "push_to_hub=true", "hub_model_id=lab/film")
    rates = tmp_path / "rates.yaml"
    rates.write_text("{hardware: any, forward: {fp32: 1.0e+9}, training: {fp32: 1.0e+9}}")
    hub.role = "read"
    assert plan(load_config(given), ALONE, None, None, rates, False, None)
    assert hub.asked == []
    with pytest.raises(UserError, match="the token of somebody permits reading only"):
        distil(given)
    assert hub.asked == ["/api/whoami-v2"]
    # what this machine knows alone, a plan tells too
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no token of the hub, and an upload needs one"):
        plan(load_config(given), ALONE, None, None, rates, False, None)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_finished_run_is_not_uploaded(tmp_path):
    with pytest.raises(UserError, match="is not a finished run; give a run directory"):
        push_run(tmp_path, None, None)


def test_runs_side_by_side_are_not_uploaded_over_one_another(tmp_path):
    given = ["sst2", "push_to_hub=true", f"output_dir={tmp_path / 'out'}", "encoders=[x]"]
    with pytest.raises(UserError, match="is for one run of distill, not for finetune; upload"):
        finetune(load_config(given), World(0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match="not for --seeds"):
        runs_to_submit(given, "0-1")
    with pytest.raises(UserError, match="not for a sweep"):
        make_grid([*given[1:], "tasks=[sst2]", "methods=[mean]", "seeds=2", "student=L6-H256-A8"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_push_takes_the_onnx_files_with_it_to_a_stand_in_hub(hub, finished, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    run = shutil.copytree(finished, tmp_path / "run")
    export_onnx(str(run), False, None, None, None, None)
    push_run(run, "onnx-too", None)
    held = hub.repos["somebody/onnx-too"]
    assert held["onnx/model.onnx"] == (run / "onnx" / "model.onnx").read_bytes()
    assert b"(onnx/model.onnx)" in held["README.md"]
