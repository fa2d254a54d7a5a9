"""The turns of LoRA adapters: a step computes under one of them, or under none."""

from dataclasses import dataclass

from .plan import StepKind

# An adapter's turn lasts until this many tokens were computed, a step counting as `STEP_TOKENS` at least: four steps of
# a few rows, two of sixteen, one that prefills. A change of adapter makes llama.cpp reserve its buffers again (4-5 ms,
# Gemma 3 270M, Q4_K_M, on 2 idle Xeon cores, a third of a step of one row; 7-9 ms in all before one of sixteen, a sixth
# of it), and the answers under other adapters wait for as long as a turn lasts.
TURN_TOKENS = 32
STEP_TOKENS = 8


@dataclass(slots=True)
class _AdapterGroup:
    """The live sequences under one adapter: their number, the tokens of its turn so far, and its last step's kind."""

    live: int = 0
    spent: int = 0
    kind: StepKind = StepKind.ROWS


class AdapterRotation:
    """Round robin over LoRA adapters (None: the bare model): one adapter is active per step.

    Only adapters with live sequences take part; the first in `order` has the turn.
    """

    def __init__(self) -> None:
        self._groups: dict[str | None, _AdapterGroup] = {}

    @property
    def order(self) -> tuple[str | None, ...]:
        """Every adapter with a live sequence, in the order in which they may compute."""
        return tuple(self._groups)

    def join(self, adapter: str | None) -> None:
        """Count one more sequence under `adapter`."""
        self._groups.setdefault(adapter, _AdapterGroup()).live += 1

    def leave(self, adapter: str | None) -> None:
        """Count one sequence less under `adapter`."""
        self._groups[adapter].live -= 1
        if self._groups[adapter].live == 0:
            del self._groups[adapter]

    def kind(self, adapter: str | None) -> StepKind:
        """The kind of the last step under `adapter`."""
        return self._groups[adapter].kind

    def computed(self, adapter: str | None, n_tokens: int, kind: StepKind) -> None:
        """Charge a step of `n_tokens` to `adapter`'s turn."""
        group = self._groups[adapter]
        group.kind = kind
        group.spent += max(n_tokens, STEP_TOKENS)
        if group.spent >= TURN_TOKENS:
            group.spent = 0
            self._groups[adapter] = self._groups.pop(adapter)
