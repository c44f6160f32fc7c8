"""PyTorch's allocator: what is asked for, and that the user's word stands."""

import subprocess
import sys

import pytest

from fastllava.console.allocator import GROWING, VARIABLES, allocator_in_words, let_memory_grow


def test_memory_grows_where_nothing_is_said() -> None:
    environment = {"HOME": "/"}
    assert allocator_in_words(environment) == "PyTorch's own setting"
    let_memory_grow(environment)
    assert environment == {"HOME": "/", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_in_words(environment) == "PYTORCH_ALLOC_CONF=expandable_segments:True"


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["max_split_size_mb:512", "expandable_segments:False", ""])
def test_what_the_user_has_set_stands(name: str, value: str) -> None:
    environment = {name: value}
    let_memory_grow(environment)
    assert environment == {name: value}
    assert allocator_in_words(environment) == f"{name}={value}"


def test_the_program_asks_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    code = (
        "import os, sys, builtins\n"
        "found, real = [], builtins.__import__\n"
        "def noting(name, *args, **options):\n"
        "    if name == 'torch' and not found:\n"
        f"        found.append(os.environ.get('{VARIABLES[0]}'))\n"
        "    return real(name, *args, **options)\n"
        "builtins.__import__ = noting\n"
        "from fastllava.entry import main\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv = ['fastllava', 'toggles']\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('found', *found)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == f"found {GROWING}", done.stderr
