"""Configs as they are found and printed; what is in them is checked in test_config."""

from pathlib import Path

import pytest

from fastllava.cli import main
from fastllava.config import load_config
from fastllava.config.load import SHIPPED, resolved, shipped
from fastllava.errors import UserError

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml") if not path.stem.startswith("mix"))


@pytest.mark.parametrize("name", NAMES)
def test_what_config_prints_is_read_as_the_same_config(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fastllava", "config", name, "train.max_steps=3", "kernels=reference"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    config = load_config(printed)
    assert config == load_config(SHIPPED / f"{name}.yaml", ["train.max_steps=3", "kernels=reference"])
    assert resolved(config) == printed.read_text(encoding="utf-8")


def test_a_password_is_not_printed(tmp_path):
    assert "secret" not in resolved(load_config(SHIPPED / "demo_pretrain.yaml", ["model.llm=https://me:secret@host/llm"]))


def test_a_file_that_is_there_is_no_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped(Path("demo_pretrain")) == shipped(Path("demo_pretrain.yaml")) == SHIPPED / "demo_pretrain.yaml"
    assert shipped(Path("elsewhere/demo_pretrain.yaml")) is None
    assert load_config("demo_pretrain") == load_config(SHIPPED / "demo_pretrain.yaml")
    Path("demo_pretrain.yaml").write_text("stage: pretrain\n", encoding="utf-8")
    assert shipped(Path("demo_pretrain.yaml")) is None
    with pytest.raises(UserError, match=r"output_dir: is missing"):
        load_config(Path("demo_pretrain.yaml"))


def test_a_config_that_is_not_there_names_those_that_are():
    with pytest.raises(UserError, match=rf"nowhere\.yaml: cannot be read .* shipped one: {', '.join(NAMES)}$"):
        load_config(Path("nowhere.yaml"))
