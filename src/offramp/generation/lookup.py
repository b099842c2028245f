"""Prompt lookup decoding (Saxena 2023): drafts from the earlier text.

If the last tokens occurred earlier, the tokens that followed them there are the draft. Such a
draft runs no layer of the model.
"""


class Lookup:
    """Remembers where each sequence of ``size`` tokens last occurred in a text."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def push(self, token: int) -> None:
        """Append a token to the text."""
        if len(self._text) >= self.size:
            self._after[tuple(self._text[-self.size :])] = len(self._text)
        self._text.append(token)

    def drafts(self, at_most: int) -> list[int]:
        """Return the tokens that followed the last occurrence of the last ``size`` tokens.

        The list is empty if they did not occur before. If fewer than ``at_most`` tokens followed,
        these are repeated.
        """
        place = self._after.get(tuple(self._text[-self.size :])) if self.size else None
        if place is None:
            return []
        period = len(self._text) - place
        return [self._text[place + n % period] for n in range(at_most)]
