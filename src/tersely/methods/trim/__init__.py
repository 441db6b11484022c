"""Which tokens of the vocabulary are wanted. A new method is one file and one line in TRIMS."""

from tersely.methods.trim.frequency import Frequency
from tersely.methods.trim.languages import Languages
from tersely.methods.trim.protocol import TokenChoice, Tokens

__all__ = ["TRIMS", "Frequency", "Languages", "TokenChoice", "Tokens"]

TRIMS: tuple[type[TokenChoice], ...] = (Frequency, Languages)
"""By what text they are used in, or by the letters that they are made of."""
