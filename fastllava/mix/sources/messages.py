"""The `messages` of Hugging Face's chat data sets; `chat` reads them."""

from fastllava.mix.sources.chat import MessagesKeys as Keys
from fastllava.mix.sources.chat import read

__all__ = ["Keys", "read"]
