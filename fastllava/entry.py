"""The program `fastllava`, which imports nothing before it is ready to be interrupted."""

import signal


def main() -> None:
    """`fastllava.cli.main`, whose imports take a second: a Ctrl-C within that ends the process as it does any other."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fastllava import cli

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    cli.main()
