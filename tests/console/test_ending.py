"""What is said is never worth a run, a signal is answered once, and the end comes soon; each in a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest

TALKS = """
import sys
from fastllava.console.ending import talk_to_whoever_listens
talk_to_whoever_listens()
from rich.console import Console
for k in range(3000):
    print("line", k)
    Console().print("rich", k)
    print("err", k, file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


def python(script, *args, **options):
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], text=True, **options)


def test_a_reader_that_leaves_costs_nothing(tmp_path):
    for stream in ("stdout", "stderr"):
        process = python(TALKS, tmp_path / stream, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: subprocess.PIPE})
        pipe = getattr(process, stream)
        assert pipe.readline() in ("line 0\n", "err 0\n")
        pipe.close()
        assert process.wait(30) == 0
        assert (tmp_path / stream).read_text() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_under_stdout_is_said_once(tmp_path):
    with open("/dev/full", "w") as full:
        process = python(TALKS, tmp_path / "out", stdout=full, stderr=subprocess.PIPE)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    assert (tmp_path / "out").exists()
    assert [line for line in err.splitlines() if not line.startswith("err ")] == [
        "stdout cannot be written (No space left on device); what is said there from here on is lost, all else goes on"
    ]
    with open("/dev/full", "w") as full:
        assert python(TALKS, tmp_path / "err", stdout=subprocess.DEVNULL, stderr=full).wait(30) == 0
    assert (tmp_path / "err").exists()


def test_without_any_stream(tmp_path):
    closed = {"preexec_fn": lambda: (os.close(1), os.close(2))}
    assert python(TALKS, tmp_path / "out", **closed).wait(30) == 0
    assert (tmp_path / "out").read_text() == "done"


def test_everything_arrives_where_someone_listens(tmp_path):
    out, err = python(TALKS, tmp_path / "out", stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate(timeout=30)
    assert out == "".join(f"line {k}\nrich {k}\n" for k in range(3000))
    assert err == "".join(f"err {k}\n" for k in range(3000))


@pytest.mark.parametrize(
    "hangs", ["threading.Thread(target=time.sleep, args=(3600,)).start()", "import atexit; atexit.register(time.sleep, 3600)"]
)
def test_what_hangs_at_the_end_holds_nobody_up(hangs):
    begin = "import sys, threading, time\nfrom fastllava.console import ending\nending._SECONDS = 0.5\n"
    assert python(f"{begin}{hangs}\nending.end_soon(3)\nsys.exit(3)").wait(20) == 3


def test_the_end_takes_its_time_when_nothing_hangs():
    script = "import sys\nfrom fastllava.console import ending\nending.end_soon(3)\nsys.exit(3)"
    began = time.monotonic()
    assert python(script).wait(20) == 3
    assert time.monotonic() - began < 4


STOPS = """
import signal, sys, time
from fastllava.console.stopping import second_signal_ends, stop_requests
signal.signal(signal.SIGINT, signal.default_int_handler)
with second_signal_ends(), stop_requests() as received:
    print("ready", flush=True)
    while not received: time.sleep(0.01)
    print("first", flush=True)
    {then}
print("saved", flush=True)
sys.exit(128 + received[0])
"""
WAITS = "time.sleep(2)"
STUCK = "import ctypes; ctypes.CDLL(None).sleep(3600)"  # as a library that lets no handler run


def stops(then, *numbers, again=0.3, **options):
    process = python(STOPS.format(then=then), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(numbers[0])
    assert process.stdout.readline() == "first\n"
    time.sleep(again)
    began = time.monotonic()
    for number in numbers[1:]:
        process.send_signal(number)
    # Not `communicate`, which would miss what readline has read ahead.
    code, seconds = process.wait(30), time.monotonic() - began
    assert process.stderr.read() == ""
    return code, process.stdout.read(), seconds


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_is_a_request(number):
    assert stops("pass", number)[:2] == (128 + number, "saved\n")


@pytest.mark.parametrize("then", [WAITS, STUCK])
@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_one_ends_at_once_and_saves_nothing(numbers, then):
    code, out, seconds = stops(then, *numbers)
    assert (code, out) == (128 + numbers[1], "")
    assert seconds < 1


def test_the_same_signal_to_process_and_group_is_one_request():
    assert stops(WAITS, signal.SIGTERM, signal.SIGTERM, again=0.0)[:2] == (128 + signal.SIGTERM, "saved\n")


def test_what_nohup_ignores_stays_ignored():
    process = python(STOPS.format(then="pass"), stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


def test_for_a_library_the_second_signal_acts_as_it_would_without():
    script = STOPS.replace("second_signal_ends(), ", "").format(then="time.sleep(5)")
    process = python(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=10)[1]


INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[1])
from fastllava import cli
import typer
app = typer.Typer()
@app.command()
def run(how: str):
    if how == "import":
        import slow
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error
cli.app = app
sys.argv[1:] = [sys.argv[2]]
cli.main()
"""
SLOW = """
import time
print("importing", flush=True)
try:
    time.sleep(30)
except KeyboardInterrupt as error:
    raise ImportError("initialization failed") from error
"""


def test_ctrl_c_within_an_import_ends_the_process_whatever_the_module_makes_of_it(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    process = python(INTERRUPTED, tmp_path, "import", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_an_error_that_a_ctrl_c_is_behind_is_one(tmp_path):
    process = python(INTERRUPTED, tmp_path, "error", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")
