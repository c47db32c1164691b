"""What was done in the place of what could not be done, each said once."""

from __future__ import annotations


class Notes:
    """Sentences of a rank, of which each is new once.

    Attributes
    ----------
    fresh : list of str
        Those that nobody has taken yet.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.fresh: list[str] = []

    def add(self, sentence: str) -> None:
        """Say it, unless it was said before."""
        if sentence not in self._said:
            self._said.add(sentence)
            self.fresh.append(sentence)

    def take(self) -> list[str]:
        """The new ones, which are new no more."""
        taken, self.fresh = self.fresh, []
        return taken
