"""The installed wheel, in an empty folder: what README shows works there too, or says in one line why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PROGRAM = "import sys; sys.argv[0] = 'fastllava'; from fastllava.entry import main; main()"
PLACE = "import fastllava, fastllava_kernels; print(fastllava.__file__, fastllava_kernels.__file__)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the wheel, without what it needs: that is here already."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = (
        subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=REPO, capture_output=True, check=False)
        .stdout.decode()
        .split("\0")
    )
    if files == [""]:
        pytest.skip("not a checkout: git does not say which files are the project's")
    for name in filter(None, files):
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (REPO / name).exists():
            place.symlink_to(os.readlink(REPO / name)) if (REPO / name).is_symlink() else place.write_bytes((REPO / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(site, cwd, *words, program=PROGRAM):
    """The finished `fastllava WORDS` of the wheel, in the folder `cwd`."""
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-P", "-c", program, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def test_it_is_the_wheel_that_is_tried(site, tmp_path):
    assert all(path.startswith(str(site)) for path in run(site, tmp_path, program=PLACE).stdout.split())


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPO / "configs").glob("*.yaml") if not path.stem.startswith("mix")))
def test_shipped_configs_are_known_by_name(site, tmp_path, name):
    by_name, by_path = run(site, tmp_path, "config", name), run(site, tmp_path, "config", f"configs/{name}.yaml")
    assert by_name.returncode == 0, by_name.stderr
    assert by_name.stdout == by_path.stdout == run(site, REPO, "config", f"configs/{name}.yaml").stdout


def test_it_plans_and_lists_toggles(site, tmp_path):
    words = ("llava15_7b_pretrain", "--size", "7b", "--drawn", 2000, "--gpu", "a100-80g")
    planned = run(site, tmp_path, "plan", *words)
    assert planned.returncode == 0, planned.stderr
    assert "GPU-hours" in planned.stdout or " h" in planned.stdout
    assert "kernels.projector_splice" in run(site, tmp_path, "toggles").stdout


def test_it_says_why_it_has_no_benches(site, tmp_path):
    done = run(site, tmp_path, "bench", "kernels")
    assert done.returncode == 2
    assert done.stderr == (
        "error: fastllava bench: the benches come with the source tree, not with the installed package; install from a checkout\n"
    )


@pytest.mark.exhaustive
def test_its_demo_ends_with_a_report(site, tmp_path):
    done = run(site, tmp_path, "demo")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "report.html").is_file()
