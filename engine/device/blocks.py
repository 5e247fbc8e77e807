"""How a loaded model's blocks are run: in which precision, with which attention, compiled or not. For every family."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from spatialprobe.engine.device.attention import CANNOT, activate, with_attention
from spatialprobe.engine.device.compiled import compiled
from spatialprobe.engine.device.precision import quantise_linears
from spatialprobe.engine.parts.experts import ExpertBlock
from spatialprobe.engine.types import Refused


def set_up_blocks(
    blocks: Sequence[nn.Module],
    *,
    precision: str = "full",  # these three as a spec has them
    attention: str = "sdpa",
    compile: str = "none",
) -> dict[str, list[int]]:
    """Changes the blocks' linear layers and `forward`, so that hooks on a block stay outside of what is compiled.

    Returns what was found, for the run's record: {"fp8_linears": [layers in fp8, all of them]}, or nothing. A block
    that cannot be run so raises Refused when it runs, which is when torch finds out.
    """
    activate(attention)
    found = {"fp8_linears": quantise_linears(each_block(blocks))} if precision == "fp8" else {}
    if (attention, compile) != ("sdpa", "none"):
        for block in each_block(blocks):
            run = compiled(with_attention(block.forward, attention), compile)
            block.forward = explained(run, type(block).__name__, attention)
    return found


def each_block(blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The blocks that compute: of models with experts, each expert's own."""
    for block in blocks:
        yield from block.blocks.values() if isinstance(block, ExpertBlock) else (block,)


def explained(run: Callable, name: str, attention: str) -> Callable:
    """`run`, with errors that say which of the user's words the block cannot do."""
    from torch._dynamo.exc import TorchDynamoException

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            if any(words in str(error) for words in CANNOT):
                raise Refused(
                    f"attention {attention} cannot do what {name} asks for, such as a mask; try auto"
                ) from error
            if isinstance(error, TorchDynamoException):
                raise Refused(f"{name} cannot be compiled: {lines[0]}; run it without --compile") from error
            raise

    return forward
