"""What every test gets: no network, a cache of its own, one thread; and what the original implementation gave, recorded."""

import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

# Before anything imports torch or transformers: small tensors are slower on several threads, and two workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if not Path("/dev/nvidiactl").exists():
    # Triton decides at import: without a GPU its kernels run on CPU tensors, in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["WANDB_MODE"] = "disabled"
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        # As under nohup or after `&` in a script. What the tests start would ignore it too; a handler is not handed on.
        signal.signal(number, lambda *_: None)

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden"
LARGER = REPO.parent / "shared" / "golden"
"""More recordings, for those who have them beside the checkout."""
# Makes `benches` known by its place: it is no part of an installed package, and must not be found by the import path.
runpy.run_path(str(REPO / "benches" / "__main__.py"))


GPU_GONE = 75
"""Exit code of a process whose GPU a test left unusable."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --leave-out, for a run that goes on where another was stopped."""
    parser.addoption("--leave-out", type=Path, metavar="FILE", help="node ids of tests not to run, one a line")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that --leave-out lists."""
    if (path := config.getoption("--leave-out")) is not None:
        names = set(path.read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in names])
        items[:] = [item for item in items if item.nodeid not in names]


def pytest_runtest_logfinish(nodeid: str) -> None:
    """After an illegal access a process gets nothing but errors from its GPU: it ends, and another takes the tests that are left."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            # The controller starts another in its place.
            os._exit(GPU_GONE)
        pytest.exit(f"{nodeid} left the GPU unusable: {error}", GPU_GONE)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def golden() -> Path:
    """What the original implementation gave, recorded: see the README.md there."""
    return GOLDEN


@pytest.fixture(scope="session")
def larger() -> Path:
    """What original tools gave on inputs that do not come with the project."""
    if not LARGER.is_dir():
        pytest.skip(f"no {LARGER} beside the checkout")
    return LARGER


_EXTRA = [pytest.param("larger", marks=pytest.mark.exhaustive)] if LARGER.is_dir() else []


@pytest.fixture(scope="session", params=["shipped", *_EXTRA])
def each_golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recordings of this repository, then the larger ones where they are, laid out in the same way."""
    if request.param == "shipped":
        return GOLDEN
    folder = tmp_path_factory.mktemp("golden")
    for path in (*LARGER.iterdir(), LARGER.parent / "tokenizer"):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="session")
def golden_pixels(each_golden: Path) -> dict[str, np.ndarray]:
    """The original's fp32 pixels by `size/policy/file`. The shipped file holds 8-bit levels, and each level's value by channel."""
    pixels = load_file(each_golden / "pixels" / "pixels.safetensors")
    table = pixels.pop("table", None)
    return pixels if table is None else {name: table[np.arange(3)[:, None, None], level] for name, level in pixels.items()}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared sets made by a test do not land in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
