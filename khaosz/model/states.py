"""The states of one sequence in all recurrent layers, and those that it can go back to.

A state holds all earlier positions together, so that none can be taken out again. What is kept
instead: states at a few earlier lengths (`SNAPSHOTS` at most), and the inputs of the last pass if
it was short, from which the state within it is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from khaosz.model.recurrent import Recurrent, State

SNAPSHOTS = 4
# A pass of at most as many positions (a draft) can be taken back in part. A longer one (a prompt)
# keeps a state as many before its end, where the next turn of a chat often differs: by the end of
# the template, or by reasoning that is left out.
_RECENT = 16
_STRIDE = 512  # and one at each multiple of this


class States:
    """A state, or none, for each layer; of one row, in fp32."""

    def __init__(self, shapes: Sequence[tuple[tuple[int, ...], ...]], device: torch.device) -> None:
        """`shapes`: `ModelConfig.state_shapes` of each layer."""
        self.shapes, self.device, self.length = list(shapes), device, 0
        self._layers = [i for i, each in enumerate(self.shapes) if each]
        self._now: dict[int, State] = {i: self._zeros(i) for i in self._layers}
        self._kept: dict[int, dict[int, State]] = {}  # by length and layer
        self._last: dict[int, list[_Pass]] = {}  # by layer, the latest last
        self._marks: list[int] = []  # positions of a pass, from its start, whose states are kept

    @staticmethod
    def bytes_at_most(shapes: Sequence[tuple[tuple[int, ...], ...]]) -> int:
        """Of a sequence: its state, those before the last two passes, and those that are kept."""
        numbers = sum(torch.Size(shape).numel() for each in shapes for shape in each)
        return 4 * (3 + SNAPSHOTS) * numbers

    @property
    def nbytes(self) -> int:
        # Another thread may read this while one computes: `list` copies in one step.
        states = list(self._now.values())
        states += [each.before for passes in list(self._last.values()) for each in list(passes)]
        for kept in list(self._kept.values()):
            states += list(kept.values())
        return sum(tensor.nbytes for state in states for tensor in state)

    def scan(self, part: Recurrent, inputs: tuple[Tensor, ...], *, one_by_one: bool) -> Tensor:
        """The outputs of a part at T new positions, from inputs (1, T, ...). `one_by_one`: computed
        in the same way however many there are. The length moves with the cache's."""
        layer, count = part.layer, inputs[0].shape[1]
        if layer == self._layers[0]:
            self._marks = self._plan(count)
        state = self._now[layer]
        # A draft that is computed in tiles has two passes.
        passes = self._last[layer] = self._last.get(layer, [])[-1:] if one_by_one else []
        ends = range(1, count + 1) if one_by_one else sorted({*self._marks, count})
        if one_by_one or 1 < count <= _RECENT:
            # The state of one position may be written in place.
            before = _copied(state) if one_by_one or len(ends) > 1 else state
            passes.append(_Pass(part, inputs, before, self.length, one_by_one))
        outputs = []
        for start, end in pairwise((0, *ends)):
            output, state = part.scan(tuple(x[:, start:end] for x in inputs), state)
            outputs.append(output)
            if end in self._marks:
                self._kept.setdefault(self.length + end, {})[layer] = _copied(state)
        self._now[layer] = state
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _plan(self, count: int) -> list[int]:
        """Positions of a pass, from its start, at which states will be kept; forgets others."""
        marks = set(range(_STRIDE - self.length % _STRIDE, count + 1, _STRIDE))
        if count > _RECENT:
            marks.add(count - _RECENT)
        places = [0, *sorted({*self._kept, *(self.length + mark for mark in marks)})]
        while len(places) > SNAPSHOTS + 1:
            # That without which the way back to a kept state grows least, the last left aside.
            gaps = zip(places, places[1:], places[2:], strict=False)
            places.remove(min((after - before, place) for before, place, after in gaps)[1])
        self._kept = {place: kept for place, kept in self._kept.items() if place in places}
        return [place - self.length for place in places if place > self.length]

    def reachable(self, length: int) -> int:
        """The largest length up to `length` whose state is known."""
        if not self._layers or length == self.length:
            return length
        passes = self._last.get(self._layers[0])
        if passes and length >= passes[0].start:
            return length
        return max((place for place in self._kept if place <= length), default=0)

    @torch.inference_mode()
    def at(self, length: int, *, copy: bool = False) -> States:
        """The states at a reachable length, with what is kept of shorter ones; with `copy` these
        stay as they are."""
        if length == self.length and not copy:
            return self
        other = States([()] * len(self.shapes), self.device)
        other.shapes, other._layers, other.length = self.shapes, self._layers, length
        other._kept = {place: dict(kept) for place, kept in self._kept.items() if place <= length}
        other._now = {layer: self._state(layer, length) for layer in self._layers}
        return other

    def _state(self, layer: int, length: int) -> State:
        if length == self.length:
            return _copied(self._now[layer])
        for each in reversed(self._last.get(layer, [])):
            if length >= each.start:
                return each.after(length - each.start)
        return _copied(self._kept[length][layer]) if length else self._zeros(layer)

    def _zeros(self, layer: int) -> State:
        return tuple(torch.zeros(1, *shape, device=self.device) for shape in self.shapes[layer])


class _Pass(NamedTuple):
    """A short pass: its inputs, and the state and the length before it."""

    part: Recurrent
    inputs: tuple[Tensor, ...]
    before: State
    start: int
    one_by_one: bool

    def after(self, count: int) -> State:
        """The state after its first positions, in memory of its own."""
        state, step = _copied(self.before), 1 if self.one_by_one else max(1, count)
        for start in range(0, count, step):
            inputs = tuple(x[:, start : min(start + step, count)] for x in self.inputs)
            _, state = self.part.scan(inputs, state)
        return state


def _copied(state: State) -> State:
    return tuple(tensor.clone() for tensor in state)
