"""Whose adapter is applied in the next step: round robin over the adapters that somebody asks for. Pure.

A step computes under one adapter. Each gets its turn, in a fixed order; a new one comes last. Whoever has nothing to
compute is passed over and keeps its place. So nobody waits longer than for one turn of each of the others.
"""

from dataclasses import dataclass

# A turn lasts until so many tokens were computed, a step counting as `STEP_TOKENS` at least: four steps of a few rows,
# two of sixteen, one that prefills. A change makes llama.cpp reserve its buffers anew (4-5 ms, Gemma 3 270M, Q4_K_M, on
# 2 idle Xeon cores, a third of a step of one row; 7-9 ms in all before one of sixteen, a sixth of it), and a turn is
# what the other adapters' answers wait for.
TURN_TOKENS = 32
STEP_TOKENS = 8


@dataclass(slots=True)
class _Group:
    live: int = 0
    spent: int = 0
    prefilled: bool = False


class Turns:
    """The adapters of the live sequences (None: the bare model), first whose turn it is."""

    def __init__(self) -> None:
        self._groups: dict[str | None, _Group] = {}

    @property
    def order(self) -> tuple[str | None, ...]:
        """Every adapter with a live sequence, in the order in which they may compute."""
        return tuple(self._groups)

    def join(self, adapter: str | None) -> None:
        """One more sequence wants `adapter`."""
        self._groups.setdefault(adapter, _Group()).live += 1

    def leave(self, adapter: str | None) -> None:
        """One sequence that wanted `adapter` is gone."""
        self._groups[adapter].live -= 1
        if self._groups[adapter].live == 0:
            del self._groups[adapter]

    def prefilled(self, adapter: str | None) -> bool:
        """Whether the last step under `adapter` computed prompts."""
        return self._groups[adapter].prefilled

    def computed(self, adapter: str | None, n_tokens: int, *, prefilled: bool) -> None:
        """A step computed `n_tokens` under `adapter`, prompts among them if it `prefilled`."""
        group = self._groups[adapter]
        group.prefilled = prefilled
        group.spent += max(n_tokens, STEP_TOKENS)
        if group.spent >= TURN_TOKENS:
            group.spent = 0
            self._groups[adapter] = self._groups.pop(adapter)
