"""Secrets are masked in what a run writes, says and sends, and nothing else is."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from fastllava.config import as_written, check_config
from fastllava.config.strict_yaml import in_yaml
from fastllava.console.masking import masked, masked_values, paths_behind
from fastllava.errors import UserError

HIDDEN = {
    "user and password": ("https://user:s3krit@host/p", "https://***@host/p"),
    "as a path": ("https:/user:s3krit@host/p", "https:/***@host/p"),
    "an @ in the password": ("git+ssh://u:s3@krit@host/p", "git+ssh://***@host/p"),
    "a token for a user": ("s3://s3krit@bucket/p", "s3://***@bucket/p"),
    "a query": ("/x?access_token=s3krit&n=1", "/x?access_token=***&n=1"),
    "an override": ("override 'log.api_key=s3krit': no", "override 'log.api_key=***': no"),
    "a form that is known": ("with hf_s3kritS3KRITs3krit0 in it", "with *** in it"),
}
SHOWN = [
    "model.tokenizer: /a/tokenizer.model has 3 tokens, data.max_tokens=2048",
    "train.loss_norm: 'x' is not among its values; write 'token' or 'llava'",
    "the end mark is no token: ['<', '/s>']",
    "record a:b@c: line 3",
    "torchrun: --nproc-per-node asks for more processes",
    "https://host/p",
]


@pytest.mark.parametrize(("text", "shown"), HIDDEN.values(), ids=HIDDEN)
def test_a_secret_is_masked(text, shown):
    assert masked(text) == shown
    assert masked_values({"list": [text]}) == {"list": [shown]}
    assert "s3krit" not in in_yaml({"list": [text]})


@pytest.mark.parametrize("text", SHOWN)
def test_words_are_left_as_they_are(text):
    assert masked(text) == text


def test_a_value_is_masked_by_its_key_and_by_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3krit-of-wandb")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token-file")
    monkeypatch.setenv("SOME_TOKEN", "home")
    given = {
        "api_key": "abc",
        "wandb_token": "",
        "max_tokens": 5,
        "tokenizer": "/home/me/token-file",
        "project": "my-s3krit-of-wandb",
    }
    assert masked_values(given) == {**given, "api_key": "***", "project": "my-***"}
    assert masked("user:pass@host") == "user:pass@host", "may be an id; in a config it is none"
    assert masked_values("/mnt/user:pass@host/x") == "/mnt/***@host/x"


def test_a_config_is_written_without_secrets_and_read_again(tmp_path, settings_of_a_run):
    config = check_config(settings_of_a_run(log={"project": "https://me:s3krit@host/p"}))
    written = json.dumps(as_written(config))
    assert "s3krit" not in written
    assert check_config(json.loads(written)).log.project == "https://***@host/p"


def test_a_message_about_a_config_tells_no_secret(settings_of_a_run):
    with pytest.raises(UserError, match=r"train\.seed: 'https://\*\*\*@host' is no whole number"):
        check_config(settings_of_a_run(train={"seed": "https://me:s3krit@host"}))


def test_a_line_on_the_screen_tells_no_secret(capsys):
    from fastllava.console.speaker import speaker

    speaker(Console())("in https://me:s3krit@host/p")
    assert capsys.readouterr().out == "in https://***@host/p\n"


def test_a_value_that_holds_itself_over_and_over_is_told_at_once():
    value: list = ["x"] * 10
    for _ in range(30):
        value = [value] * 10
    assert len(in_yaml(value)) == 80


@pytest.fixture
def settings_of_a_run(tmp_path):
    def make(**sections):
        return {"stage": "pretrain", "output_dir": str(tmp_path), "model": {"llm": "llm"}, "data": {"records": "r.json"}, **sections}

    return make


def test_a_masked_path_is_found_again_where_it_is_there(tmp_path):
    for user in ("me", "you"):
        (tmp_path / f"{user}:secret@mirror" / user).mkdir(parents=True)
    written = Path(masked_values({"llm": str(tmp_path / "me:secret@mirror" / "me")})["llm"])
    assert written == tmp_path / "***@mirror" / "me"
    assert paths_behind(written) == [tmp_path / "me:secret@mirror" / "me"]
    assert paths_behind(written.parent) == [tmp_path / f"{user}:secret@mirror" / "" for user in ("me", "you")]
    assert paths_behind(tmp_path / "***@elsewhere") == []
    written.parent.mkdir()
    written.symlink_to(tmp_path)
    assert paths_behind(written) == [written]
    assert paths_behind(tmp_path / "nothing") == [tmp_path / "nothing"]
