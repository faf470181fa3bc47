"""What workers died at. A worker that is killed says nothing; so each writes down what it begins.

An image can kill whoever reads it: more memory than there is, a decoder that crashes. Ray would give the part to the
next worker, for ever. After some deaths a part is done with care, image by image, each written down before it is begun;
and an image at which workers died twice so is left out.
"""

from pathlib import Path

# Workers die for many reasons, of which most are not an image; care is slow.
CAREFUL_AFTER = 3
LEFT_OUT_AFTER = 2
# So many deaths with no image begun are no image's fault.
MOST_TRIES = 12
# Of the file: no run comes near.
MOST_BYTES = 1 << 22
TRY, WRITING = "try", "writing"


class Tries:
    """The tries of a part.

    Args:
        path: of the file that remembers them; it may not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = self._lines()
        self.count = lines.count(TRY)
        # The last image of each try that ended without one that was finished.
        ends = [before for before, line in zip(lines, [*lines[1:], TRY], strict=False) if line == TRY and before != TRY]
        self.deaths = {int(end): ends.count(end) for end in ends if end.isdigit()}

    def _lines(self) -> list[str]:
        try:
            with self.path.open("rb") as file:
                return file.read(MOST_BYTES).decode("ascii", "replace").split()
        except FileNotFoundError:
            return []

    @property
    def careful(self) -> bool:
        """Whether this try takes one image at a time."""
        return self.count >= CAREFUL_AFTER

    @property
    def hopeless(self) -> bool:
        """Whether workers die before they begin any image, or where one is left out already."""
        if self.deaths:
            return max(self.deaths.values()) > LEFT_OUT_AFTER
        return self.count >= MOST_TRIES

    def begin(self) -> None:
        """Writes down that a try begins."""
        self._append(TRY)

    def begin_image(self, place: int) -> None:
        """Writes down that an image begins."""
        self._append(str(place))

    def begin_writing(self) -> None:
        """Writes down that all images are done."""
        self._append(WRITING)

    def left_out(self, place: int) -> bool:
        """Whether workers died at an image."""
        return self.deaths.get(place, 0) >= LEFT_OUT_AFTER

    def end(self) -> None:
        """Forgets all: the part is finished, or has failed in a way that says why."""
        self.path.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        with self.path.open("ab") as file:
            file.write(f"{line}\n".encode())


__all__ = ["Tries"]
