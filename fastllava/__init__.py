"""fastllava: trains LLaVA-1.5's two stages, packed step-exactly, equal to the original step for step."""

__version__ = "0.1.0"
