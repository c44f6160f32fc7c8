"""`fastllava toggles`: every toggle that there is, and what of it runs where."""

import torch

from fastllava import cli
from fastllava.config import check_config, key_names
from fastllava.config.toggles import kernel_toggles, train_toggles
from fastllava.train.machine import set_tf32
from fastllava_kernels import rooms

CPU = torch.device("cpu")


def test_every_key_is_one_and_every_value_is_taken():
    for toggle in (*train_toggles(), *kernel_toggles(CPU)):
        assert toggle.key in key_names() or toggle.key.removeprefix("kernels.") in rooms()
        section, _, name = toggle.key.partition(".")
        for value in toggle.values:
            typed = value == "true" if value in ("true", "false") else value
            base = {"stage": "pretrain", "output_dir": "o", "model": {"llm": "l"}, "data": {"records": "r"}}
            config = check_config(base | {section: {name: typed}}).model_dump()
            assert config[section][name] == typed


def test_what_is_listed():
    train = [f"train.{name}" for name in ("recompute", "last_layer", "compile", "tf32", "deterministic", "device")]
    assert [toggle.key for toggle in train_toggles()] == [
        *train,
        "parallel.frozen",
        "parallel.reshard",
        "parallel.reduce",
        "parallel.gather",
    ]
    assert [toggle.key for toggle in kernel_toggles(CPU)] == [f"kernels.{name}" for name in rooms()]
    by_key = {toggle.key: toggle for toggle in kernel_toggles(CPU)}
    attention, loss = by_key["kernels.attention"], by_key["kernels.masked_linear_cross_entropy"]
    assert attention.default == "reference; sdpa under train.compile"
    assert "fa3, fa4, varlen, xformers cannot run here: FlashAttention needs a CUDA GPU" in attention.why
    assert (loss.default, loss.values) == ("torch", ("auto", "triton", "torch", "reference"))
    assert "compiled only when asked for by name" in by_key["kernels.rope"].why


def test_the_command_prints_each(capsys):
    cli.toggles()
    lines = capsys.readouterr().out.splitlines()
    for toggle in (*train_toggles(), *kernel_toggles()):
        assert f"{toggle.key}: {toggle.default}" in lines


def test_tf32_is_what_the_config_says_whatever_was_set_before():
    base = {"stage": "pretrain", "output_dir": "o", "model": {"llm": "l"}, "data": {"records": "r"}}
    before = torch.get_float32_matmul_precision()
    try:
        for wanted, precision in ((True, "high"), (False, "highest")):
            set_tf32(check_config(base | {"train": {"tf32": wanted}}))
            assert torch.get_float32_matmul_precision() == precision
        torch.set_float32_matmul_precision("medium")
        set_tf32(check_config(base))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
