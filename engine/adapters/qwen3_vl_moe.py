"""Qwen3-VL with a mixture of experts in its decoder blocks (transformers). The vision tower is Qwen3-VL's.

All experts of a block are two tensors, so only those of the wanted blocks are read. A tap on decoder blocks 0 to 2 sees
the value before the model adds its DeepStack features.
"""

from pathlib import Path

import torch
from torch import nn

from spatialprobe.engine.parts.qwen import ANY, QwenKin


class Qwen3VLMoe(QwenKin):
    MODEL_TYPE = "qwen3_vl_moe"
    MODEL = "Qwen3VLMoeModel"
    IGNORED = {"text_config": {"norm_topk_prob": True, "router_aux_loss_coef": ANY}}

    turned = False  # whether the files hold matrices of experts the other way round than transformers

    def skeleton(self, depth: int) -> list[nn.Module]:
        modules = super().skeleton(depth)
        if self.turned:
            turn_experts(modules[0])
        return modules

    def load(self, depth: int, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        # Published files have [experts, in, out], what transformers 5 writes is [experts, out, in], as it computes.
        files = self.checkpoint.tensor_files()
        one = next((name for name in files if name.endswith("mlp.experts.gate_up_proj")), None)
        if one is not None:
            self.turned = self.checkpoint.shapes(files[one])[one][1] == self.config.text_config.hidden_size
        super().load(depth, device, dtype, cache)
        if self.turned:
            turn_experts(self.model)


def turn_experts(model: nn.Module) -> None:
    """Swaps the two dimensions of every expert's matrices."""
    for path, experts in model.named_modules():
        if path.endswith("mlp.experts"):
            for name in ("gate_up_proj", "down_proj"):
                turned = getattr(experts, name).data.transpose(1, 2).contiguous()
                setattr(experts, name, nn.Parameter(turned, requires_grad=False))
