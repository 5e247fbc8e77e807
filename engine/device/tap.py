"""Reads the outputs of some blocks while a model runs. Knows nothing about which model it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Taps:
    """Forward hooks on the wanted blocks."""

    def __init__(self, blocks: Sequence[nn.Module], layers: tuple[int, ...]):
        if max(layers) >= len(blocks):
            raise ValueError(f"layer {max(layers)} is beyond the last loaded block, {len(blocks) - 1}")
        self.layers = layers
        self._receive: Callable[[int, Tensor], None] | None = None
        self._passes = 1
        self._ran: dict[int, int] = {}  # layer -> times that it ran
        self._parts: dict[int, list[Tensor]] = {}  # layer -> tokens of the passes so far
        self._hooks = [blocks[i].register_forward_hook(self._hook(i)) for i in layers]

    def _hook(self, layer: int):
        def hook(module, args, output):
            if self._receive is None:
                return
            self._ran[layer] += 1
            # Some blocks return (video, text) or (hidden, ...): the hidden states come first.
            parts = self._parts.setdefault(layer, [])
            parts.append(output[0] if isinstance(output, tuple) else output)
            if self._ran[layer] == self._passes:
                del self._parts[layer]
                self._receive(layer, parts[0] if len(parts) == 1 else torch.cat(parts, 1))

        return hook

    @contextmanager
    def into(self, receive: Callable[[int, Tensor], None], passes: int = 1) -> Iterator[None]:
        """During the `with`, `receive(layer, tokens)` is called as each wanted block ends: keep only what is needed.

        Blocks that run `passes` times end with the last one, and their tokens [B, N, C] are put together on N.
        """
        self._receive, self._passes = receive, passes
        self._ran = dict.fromkeys(self.layers, 0)
        self._parts = {}
        try:
            yield
        finally:
            self._receive, self._parts = None, {}
        assert set(self._ran.values()) == {passes}, f"blocks should have run {passes} times each, ran {self._ran}"

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
