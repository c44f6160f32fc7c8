"""The program `fastllava`, which imports nothing before it is ready to be interrupted."""

import signal
import sys


def main() -> None:
    """`fastllava.cli.main`, whose imports take a second: a Ctrl-C within that ends the process as it does any other."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from fastllava.console.allocator import let_memory_grow

        # Before torch is imported, which some commands do and some do not.
        let_memory_grow()
        from fastllava import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0].startswith("fastllava"):
            raise
        mend = "install what it needs: pip install -e . in the checkout, or from the wheels that make kit gathers"
        sys.exit(f"error: this Python ({sys.executable}) lacks the package {error.name}; {mend}")
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
    cli.main()
