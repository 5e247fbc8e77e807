"""Qwen3.5 (transformers). Three of four decoder blocks are linear attention (gated delta rule).

transformers computes those in plain torch, or with kernels of other packages where they are installed: which of them
are there is part of the spec.
"""

from importlib.metadata import distributions

from spatialprobe.engine.parts.qwen import ANY, QwenKin

KERNELS = [n for n in ("causal-conv1d", "fla-core", "flash-linear-attention") if any(distributions(name=n))]


class Qwen35(QwenKin):
    LIBRARIES = ("transformers", *KERNELS)
    MODEL_TYPE = "qwen3_5"
    MODEL = "Qwen3_5Model"
    IGNORED = {
        "config.json": {"language_model_only": False},
        "text_config": {
            "full_attention_interval": ANY,  # read where layer_types is missing
            "attn_output_gate": True,
            "output_gate_type": "swish",
            "mamba_ssm_dtype": "float32",
            "mlp_only_layers": [],
            "mtp_num_hidden_layers": ANY,  # the head that predicts further tokens is not loaded
            "mtp_use_dedicated_embeddings": ANY,
        },
        "vision_config": {"deepstack_visual_indexes": []},
    }
