"""Reads the outputs of some blocks while a model runs. Knows nothing about which model it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


class Taps:
    """Forward hooks on the wanted blocks, set once (a hook added after torch.compile would recompile)."""

    def __init__(self, blocks: Sequence[nn.Module], layers: tuple[int, ...]):
        if max(layers) >= len(blocks):
            raise ValueError(f"layer {max(layers)} is beyond the last loaded block, {len(blocks) - 1}")
        self.layers = layers
        self._receive: Callable[[int, Tensor], None] | None = None
        self._seen: list[int] = []
        self._hooks = [blocks[i].register_forward_hook(self._hook(i)) for i in layers]

    def _hook(self, layer: int):
        def hook(module, args, output):
            if self._receive is not None:
                self._seen.append(layer)
                # Some blocks return (video, text) or (hidden, ...): the hidden states come first.
                self._receive(layer, output[0] if isinstance(output, tuple) else output)

        return hook

    @contextmanager
    def into(self, receive: Callable[[int, Tensor], None]) -> Iterator[None]:
        """During the `with`, `receive(layer, tokens)` is called as each wanted block ends: keep only what is needed."""
        self._receive, self._seen = receive, []
        try:
            yield
        finally:
            self._receive = None
        assert tuple(sorted(self._seen)) == self.layers, f"blocks {self.layers} should have run once, ran {self._seen}"

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
