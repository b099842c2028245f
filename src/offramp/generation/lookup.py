"""Drafts from the text itself: what followed the last tokens when they stood there before.

Prompt lookup decoding (Saxena 2023). Such drafts cost nothing to make.
"""


class Lookup:
    """Remembers where each run of ``size`` tokens last stood in a text."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def push(self, token: int) -> None:
        """The text goes on with this token."""
        if len(self._text) >= self.size:
            self._after[tuple(self._text[-self.size :])] = len(self._text)
        self._text.append(token)

    def drafts(self, at_most: int) -> list[int]:
        """What may follow, or nothing where the last tokens are new.

        Where what followed reaches the end of the text, it goes on as it began.
        """
        place = self._after.get(tuple(self._text[-self.size :])) if self.size else None
        if place is None:
            return []
        period = len(self._text) - place
        return [self._text[place + n % period] for n in range(at_most)]
