"""Figures that the published study (arXiv 2605.28132) reports, by preset. Measured on its data, with its probes."""

SOURCE = "arXiv 2605.28132"

COLUMNS = (  # (task, metric, what 1 of the study's unit is)
    ("tagging", "AP_mid", 0.01),
    ("tagging", "mAP", 0.01),
    ("instance", "T-SR", 0.01),
    ("instance", "T-mIoU", 0.01),
    ("geometry", "point_error", 1),
    ("geometry", "AbsRel", 1),
    ("geometry", "AUC@30", 1),
)
FIGURES = {  # preset -> as printed there
    "wan2.1-t2v-14b": (71.0, 80.0, 8.5, 19.0, 0.119, 0.044, 0.614),
    "wan2.1-t2v-1.3b": (59.6, 68.0, 6.4, 16.4, 0.148, 0.065, 0.501),
    "wan2.1-i2v-14b": (60.0, 69.5, 7.3, 16.8, 0.123, 0.047, 0.605),
    "cogvideox-5b": (55.1, 69.3, 2.2, 10.7, 0.179, 0.090, 0.475),
    "open-sora-2": (56.4, 67.0, 4.3, 13.1, 0.141, 0.066, 0.560),
    "aether": (57.0, 66.4, 2.4, 10.5, 0.165, 0.084, 0.495),
    "internvl3-8b": (89.0, 93.2, 11.2, 22.6, 0.202, 0.106, 0.362),
    "qwen2.5-vl-7b": (87.6, 91.6, 10.8, 22.2, 0.234, 0.127, 0.310),
    "qwen3-vl-2b": (90.1, 93.6, 13.6, 25.5, 0.202, 0.096, 0.371),
    "qwen3-vl-8b": (83.5, 91.1, 12.4, 24.3, 0.180, 0.091, 0.424),
}


def published(preset: str | None) -> dict[tuple[str, str], float]:
    """{(task, metric): figure} in the probes' own units, shares of 1; empty for a model that the study did not report.

    The study's "CogVideoX-5B" is taken to be its text-to-video model.
    """
    figures = FIGURES.get(preset or "", ())
    return {(task, metric): figure * unit for (task, metric, unit), figure in zip(COLUMNS, figures, strict=False)}
