"""Secrets stay out of what a run writes and says."""

TOKENS = {
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJk",
    "HUGGING_FACE_HUB_TOKEN": "hf_ZxCvBnMaSdFgHjKlQw",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}


def test_no_file_of_a_run_holds_a_secret_of_its_environment_or_words(
    tmp_path, words, distil, monkeypatch, capfd
):
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    given = words(
        tmp_path / "run",
        "max_steps=2",
        "report_to=tensorboard",
        f"store={tmp_path / 'store'}",
        "teacher_validation=off",
    )
    # as a person would give them by mistake; the configuration itself knows no such key
    by_mistake = [
        f"hub_token={TOKENS['HF_TOKEN']}",
        f"tracker.api_key={TOKENS['WANDB_API_KEY']}",
        f"data.path=https://me:{TOKENS['WANDB_API_KEY']}@example.org/data",
        f"--student={TOKENS['HUGGING_FACE_HUB_TOKEN']}",
    ]
    run = distil(given, command=("distill", *given, *by_mistake))
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"run.json", "config.yaml", "log.txt", "README.md"} <= {path.name for path in files}
    said = capfd.readouterr()
    for token in TOKENS.values():
        for path in files:
            assert token.encode() not in path.read_bytes(), path
        assert token not in said.out + said.err
    command = (run / "run.json").read_text()
    assert "hub_token=[removed]" in command
    assert str(tmp_path / "store") in command  # what is not a secret is there to be given again


def test_a_line_of_the_log_loses_its_tokens(tmp_path):
    from sead_dist.runtime.run_log import RunLog, tell

    with RunLog(tmp_path, True, console=False):
        tell(f"asked with {TOKENS['HF_TOKEN']} at https://a:b@example.org/x")
    said = (tmp_path / "log.txt").read_text()
    assert "asked with [removed] at https://[removed]example.org/x" in said
