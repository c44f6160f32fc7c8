"""How the program says a line on a terminal."""

from collections.abc import Callable

from rich.console import Console

from fastllava.console.masking import masked
from fastllava.console.printable import printable

Say = Callable[[str], None]


def speaker(console: Console) -> Say:
    """A function that prints a line as it is: no markup, no wrapping, no secret, and nothing in it that a terminal would act on."""
    return lambda text: console.print(printable(masked(text)), highlight=False, soft_wrap=True, markup=False, emoji=False)
