"""GLM-4.1V (transformers' Glm4v): every frame is an image within its image processor's own budget of pixels."""

from torch import Tensor, nn

from spatialprobe.engine.parts.image_grid import fit_pixels, pixel_range
from spatialprobe.engine.parts.qwen import ANY, QwenKin


class Glm4v(QwenKin):
    MODEL_TYPE = "glm4v"
    MODEL = "Glm4vModel"
    PROCESSOR = "transformers.models.glm4v.image_processing_pil_glm4v:Glm4vImageProcessorPil"
    IMAGE = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
    TURN = ("[gMASK]<sop><|user|>\n", "<|assistant|>\n")
    CONTROL = ("<|", "[gMASK]", "<sop>")
    IGNORED = {
        "text_config": {"attention_bias": True},
        "vision_config": {"hidden_dropout_prob": ANY},  # for training
    }

    def pixel_budget(self, images: int) -> tuple[int, int]:
        return pixel_range(self.image_config)

    def fitted_size(self, least: int, most: int) -> tuple[int, int]:
        """After `smart_resize` of transformers' `image_processing_glm4v.py`."""
        height, width = self.options["size"]
        grow = max(1, self.cell / height, self.cell / width)  # to a cell at least
        repeats = self.image_config["temporal_patch_size"]  # an image counts as so many frames
        return fit_pixels(int(height * grow), int(width * grow), self.cell, least / repeats, most / repeats)

    def cut_tower(self, tower: nn.Module) -> None:
        tower.merger = tower.post_layernorm = nn.Identity()
        tower.downsample = FirstOfCell()
        tower.config.out_hidden_size = tower.config.hidden_size  # to which `forward` views what comes out


class FirstOfCell(nn.Module):
    """Stands where the tower makes one token of the patches of a cell."""

    def forward(self, x: Tensor) -> Tensor:  # [cells, C, merge, merge] -> [cells, C]
        return x[:, :, 0, 0]
