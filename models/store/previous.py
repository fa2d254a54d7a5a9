"""The installed models' folders and the version before each, moved by renames that a kill may part at any place.

    <home>/models/<name>/       the installed model
    <home>/previous/<name>/     the model that it replaced, for `deskside rollback`
    <home>/previous/.<name>/    a third folder, while the two others change places

After every single rename, `settle` makes a whole of what is there: the name has a model, and none of the two is lost.
The caller holds the store's lock.
"""

import os
from pathlib import Path

from models.common.files import discard


class Versions:
    """The folders of each name in the store `home`."""

    def __init__(self, home: Path) -> None:
        self._models = home / "models"
        self._previous = home / "previous"

    def installed(self, name: str) -> Path:
        """The folder of the installed model."""
        return self._models / name

    def previous(self, name: str) -> Path:
        """The folder of the model before it."""
        return self._previous / name

    def _third(self, name: str) -> Path:
        return self._previous / f".{name}"  # no model's name begins with a dot

    def names(self) -> set[str]:
        """The names with a folder aside."""
        return {path.name.removeprefix(".") for path in self._previous.glob("*") if path.is_dir()}

    def is_settled(self, name: str) -> bool:
        """False after an interrupted exchange, or while another process is in one."""
        if os.path.lexists(self._third(name)):
            return False
        return os.path.lexists(self.installed(name)) or not os.path.lexists(self.previous(name))

    def settle(self, name: str) -> None:
        """Bring an interrupted exchange to an end."""
        installed, previous, third = self.installed(name), self.previous(name), self._third(name)
        for source, place in ((third, previous), (previous, installed), (third, previous)):
            if os.path.lexists(source) and not os.path.lexists(place):
                source.rename(place)
        discard(third)

    def install(self, new: Path, name: str, *, keep: bool) -> None:
        """Rename the folder `new` to the installed model. The one that was there becomes the previous one.

        Not `keep`: the previous one stays, and the one that was there takes the path `new`, for the caller to delete.
        """
        installed, previous = self.installed(name), self.previous(name)
        try:
            if os.path.lexists(installed):
                previous.parent.mkdir(exist_ok=True)
                if os.path.lexists(previous):
                    previous.rename(self._third(name))
                installed.rename(previous)
            new.rename(installed)
            if not keep:
                self.drop_previous(name, new)
        finally:
            self.settle(name)

    def drop_previous(self, name: str, trash: Path) -> None:
        """Rename the previous model, if any, to `trash`."""
        if os.path.lexists(self.previous(name)):
            self.previous(name).rename(trash)

    def exchange(self, name: str) -> None:
        """Swap the installed model and the previous one. Both exist."""
        self.installed(name).rename(self._third(name))
        self.settle(name)
