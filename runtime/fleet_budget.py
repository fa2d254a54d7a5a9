"""What the loaded models of a fleet take of its memory budget, and whether one more fits. Loads and unloads nothing."""

from collections.abc import Sequence

from .errors import LoadFailed, NoRoom
from .fleet_model import Host
from .memory import mebibytes


class Budget:
    """The memory that the models `hosts` may take together; `limit_bytes` None: as much as they like."""

    def __init__(self, hosts: Sequence[Host], limit_bytes: int | None) -> None:
        self._hosts = hosts
        self._limit_bytes = limit_bytes

    def fits(self, host: Host) -> bool:
        """Whether `host` fits beside all that are loaded."""
        return self._has_room(host, [other for other in self._hosts if other.loaded is not None])

    def can_fit(self, host: Host) -> bool:
        """Whether `host` fits beside those that cannot go, since requests lease them."""
        return self._has_room(host, self._busy())

    def require_fits_alone(self, host: Host) -> None:
        """Raise LoadFailed, with the numbers and what to change, if `host` will never fit."""
        if not self._has_room(host, []):
            raise LoadFailed(
                f"{host.name!r} needs {host.need}. The memory budget is {mebibytes(self._limit_bytes or 0)}; "
                "try a smaller --context, fewer --slots, a smaller quantization, or another --memory-budget"
            )

    def no_room(self, host: Host) -> NoRoom:
        """The error for a model that would fit if others were not answering."""
        busy = ", ".join(f"{other.name!r} ({mebibytes(other.need.total)})" for other in self._busy())
        return NoRoom(
            f"{host.name!r} needs about {mebibytes(host.need.total)}, the memory budget is "
            f"{mebibytes(self._limit_bytes or 0)}, and these are answering: {busy}; try again in a moment, or serve "
            "with a larger --memory-budget"
        )

    def _busy(self) -> list[Host]:
        return [host for host in self._hosts if host.loaded is not None and host.leases > 0]

    def _has_room(self, host: Host, beside: Sequence[Host]) -> bool:
        needed_bytes = host.need.total + sum(other.need.total for other in beside)
        return self._limit_bytes is None or needed_bytes <= self._limit_bytes
