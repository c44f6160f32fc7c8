"""`train.deterministic`: what it sets, what it refuses, and what a run says of it."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_no_sync import batch_of, model_of
from torch.utils._python_dispatch import TorchDispatchMode

from fastllava.config import OptimConfig, Stage, check_config
from fastllava.errors import UserError
from fastllava.model.ops import choose_ops
from fastllava.optim import FiniteGuard, build_optimizer, set_lr
from fastllava.train import deterministic, run, train_step
from fastllava.train.deterministic import WORKSPACE, check_repeats, deterministic_in_words, set_deterministic

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(WORKSPACE, raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]


def config_of(value: Any, **train: Any) -> Any:
    base = {"stage": "finetune", "output_dir": "o", "model": {"llm": "l", "projector": "fresh"}, "data": {"records": "r"}}
    return check_config({**base, "train": {"deterministic": value, **train}})


def test_the_switch_is_what_the_config_says_whatever_was_set_before() -> None:
    for before in (True, False):
        for value in ("auto", True, False):
            torch.use_deterministic_algorithms(before, warn_only=True)
            set_deterministic(config_of(value))
            assert torch.are_deterministic_algorithms_enabled() is (value is True)
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
    set_deterministic(config_of(True))
    assert not torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]


def test_the_workspace_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    set_deterministic(config_of("auto"))
    assert WORKSPACE not in os.environ
    set_deterministic(config_of(True))
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")
    set_deterministic(config_of(True))
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    set_deterministic(config_of(False))
    message = f"train.deterministic: true needs {WORKSPACE} to be :4096:8 or :16:8, and the environment has ':0:0'; unset it there"
    with pytest.raises(UserError, match=re.escape(message)):
        set_deterministic(config_of(True))


@pytest.mark.parametrize("value", [1, 0, None, "yes", 0.5])
def test_what_is_no_value(value: Any) -> None:
    with pytest.raises(UserError, match=r"train\.deterministic: "):
        config_of(value)


def test_attention_that_does_not_repeat_is_refused_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ops: Any = SimpleNamespace(chosen={"attention": "fa3"}, attention=None)
    tried: list[tuple[Any, ...]] = []

    def repeats(*given: Any) -> bool:
        tried.append(given)
        return False

    monkeypatch.setattr(deterministic, "repeats", repeats)
    for value, device in (("auto", GPU), (False, GPU), (True, CPU)):
        check_repeats(config_of(value), device, ops, 128)
    assert not tried
    with pytest.raises(UserError, match=r"kernels\.attention=fa3 was asked for one order of additions, and gives other bits each time; "):
        check_repeats(config_of(True), GPU, ops, 128)
    assert tried == [(None, GPU, torch.bfloat16, 128)]


def test_kernels_without_an_order_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastllava_kernels.attention import availability

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(availability, "_trouble", lambda module: None)
    monkeypatch.setattr(availability, "_flash_4_orders_on_9", lambda: False)
    assert choose_ops({"attention": "fa4"}, GPU, torch.bfloat16).chosen["attention"] == "fa4"
    with pytest.raises(UserError, match=r"kernels\.attention: 'fa4' cannot run here \(the installed FlashAttention 4 has no backward with"):
        choose_ops({"attention": "fa4"}, GPU, torch.bfloat16, repeats=True)


@pytest.mark.parametrize(
    ("value", "device", "world", "said"),
    [
        ("auto", CPU, 1, "deterministic: auto; additions have one order, so a resumed run is bit for bit the unbroken one"),
        (True, GPU, 8, "deterministic: true; additions have one order, so a resumed run is bit for bit the unbroken one, on 8 processes"),
        ("auto", GPU, 1, "deterministic: auto; attention's backward adds in any order, which is faster, so a resumed run equals"),
        (False, GPU, 1, "deterministic: false; attention's backward adds in any order"),
    ],
    ids=["auto on a CPU", "true on GPUs", "auto on a GPU", "false on a GPU"],
)
def test_what_a_run_says(value: Any, device: torch.device, world: int, said: str) -> None:
    assert deterministic_in_words(config_of(value), device, world).startswith(said)


def test_a_run_under_the_switch_is_the_run_without_it(settings: Any, tmp_path: Path) -> None:
    """On a CPU, where additions have one order anyway, and where PyTorch refuses the same ops of a CPU that it refuses."""
    summaries = []
    for value in (True, "auto"):
        heard = io.StringIO()
        values = settings("finetune", output_dir=str(tmp_path / str(value)), train={"max_steps": 2, "deterministic": value})
        summaries.append(run(check_config(values), Console(file=heard, width=400)).summary)
        assert f"deterministic: {str(value).lower()}; additions have one order" in heard.getvalue()
        assert torch.are_deterministic_algorithms_enabled() is (value is True)
    assert summaries[0]["final_loss"] == summaries[1]["final_loss"]


class Names(TorchDispatchMode):
    """The ops that are dispatched, and whether any of their tensors is a floating one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        floats = any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in args)
        self.found.add((bare(func.name().partition("::")[2].partition(".")[0]), floats))
        return func(*args, **(kwargs or {}))


def bare(name: str) -> str:
    """A name as both PyTorch's pages and its dispatcher have it: 'NLLLoss' and 'nll_loss_forward' are 'nllloss'."""
    return re.sub(r"_(forward|backward)$", "", name).replace("_", "").lower()


def refused_on_a_gpu() -> set[str]:
    """What PyTorch's page on the switch says that it refuses."""
    page = torch.use_deterministic_algorithms.__doc__ or ""
    refused = page.partition("normally-nondeterministic operations will throw a")[2].partition("In addition")[0]
    return {bare(name.rpartition(".")[2]) for name in re.findall(r"\* :\w+:`([\w.]+)`", refused)}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_no_op_of_a_step_is_refused_on_a_gpu(world: Path, stage: Stage) -> None:
    """On the meta device, so with the ops that a GPU takes; what is inside the kernels' ops aside, which a GPU's own tests look at."""
    refused = refused_on_a_gpu()
    assert {"cumsum", "histc", "nllloss", "avgpool3d"} <= refused
    model = model_of(world, stage, "none").to("meta")
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=1e-3))
    guard = FiniteGuard(optimizer, torch.device("meta"))
    set_lr(optimizer, 0.5)
    with Names() as names:
        train_step(model, optimizer, guard, [batch_of(2), batch_of(0)], torch.device("meta"), 1.0)
    assert ("mm", True) in names.found
    # Sums of whole numbers have one result in any order.
    assert {name for name, floats in names.found if floats or name != "cumsum"} & refused == set()
