"""Where a JSON object ends, in text that comes in pieces. Looks at brackets and strings only: others parse it."""

from __future__ import annotations

import re

_STRUCTURE = re.compile(r'[{}\[\]"]')
_IN_STRING = re.compile(r'["\\]')


class JsonScan:
    """The text given to `feed` must begin with the object, and grow."""

    def __init__(self) -> None:
        self.end: int | None = None  # behind the object
        self._at = 0
        self._depth = 0
        self._in_string = False

    def feed(self, text: str) -> int | None:
        """Where the object ends; None: not yet."""
        while self.end is None:
            found = (_IN_STRING if self._in_string else _STRUCTURE).search(text, self._at)
            if found is None:
                self._at = len(text)
                break
            character = found[0]
            if character == "\\":
                if found.end() == len(text):  # what it escapes is still to come
                    self._at = found.start()
                    break
                self._at = found.end() + 1
                continue
            self._at = found.end()
            if character == '"':
                self._in_string = not self._in_string
            elif character in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    self.end = self._at
        return self.end
