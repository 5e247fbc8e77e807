"""Models of several transformers, of which each noise step runs one: their blocks as one sequence for taps."""

from collections.abc import Mapping

from torch import nn


class ExpertBlock(nn.Module):
    """The blocks at one depth of every expert. Called, it runs that of the expert which `use` named last."""

    def __init__(self, blocks: Mapping[str, nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)
        self.expert = next(iter(blocks))

    def forward(self, *args, **kwargs):
        return self.blocks[self.expert](*args, **kwargs)


def join(experts: Mapping[str, nn.Module]) -> nn.ModuleList:
    """Makes the `blocks` of these models one list, which it returns; a single model keeps its own.

    Hooks on the list's blocks see whichever expert runs.
    """
    if len(experts) == 1:
        return next(iter(experts.values())).blocks
    depths = zip(*(model.blocks for model in experts.values()), strict=True)
    shared = nn.ModuleList(ExpertBlock(dict(zip(experts, blocks, strict=True))) for blocks in depths)
    for model in experts.values():
        model.blocks = shared
    return shared


def use(blocks: nn.ModuleList, expert: str) -> None:
    """Makes blocks that `join` returned run those of this expert. Nothing to do where there is one only."""
    for block in blocks:
        if isinstance(block, ExpertBlock):
            block.expert = expert
