"""Fields of a model's config that the installed library does not know: ignoring them would change values unseen."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

# Written by the libraries into every config, or about generating text: nothing that features depend on.
HARMLESS = frozenset(
    "architectures auto_map do_sample dtype max_length model_type temperature tokenizer_class top_k top_p torch_dtype "
    "transformers_version use_cache bos_token_id eos_token_id pad_token_id".split()
)

# What transformers 4 wrote into configs beside a model's own fields: its defaults for generating, or names of fields
# that its successor reads as others (rope_theta).
TRANSFORMERS_4 = frozenset(
    "add_cross_attention attn_implementation bad_words_ids begin_suppress_tokens cache_implementation "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id is_decoder "
    "length_penalty min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores "
    "prefix pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate rope_local_base_freq "
    "rope_scaling rope_theta sep_token_id sliding_window_pattern suppress_tokens task_specific_params tf_legacy_loss "
    "tie_encoder_decoder torchscript typical_p use_bfloat16".split()
)


def check_fields(
    config: Mapping[str, Any],
    cls: type,  # a diffusers model, or a transformers config
    where: str,  # the file, for the message
    *,
    harmless: Collection[str] = (),  # fields of published configs that the library is known to ignore
) -> None:
    """Raises ValueError naming the fields of `config` that `cls` does not take. Nested tables are not looked into.

    Names that start with an underscore are the libraries' own notes.
    """
    known = {name for owner in cls.__mro__ for name in _parameters(owner)}
    if hasattr(cls, "attribute_map"):  # transformers: defaults, other names, and nested configs
        known |= set(cls.attribute_map) | set(cls.sub_configs) | set(cls().to_dict())
    unknown = sorted(
        name for name in config if name not in known | HARMLESS | set(harmless) and not name.startswith("_")
    )
    if unknown:
        library = cls.__module__.partition(".")[0]
        raise ValueError(
            f"{where} has fields that {cls.__name__} of the installed {library} does not know: {', '.join(unknown)}; "
            f"a newer {library} may, and features without them would be another model's"
        )


def table_of(config: Mapping[str, Any], name: str, where: str, needs: Collection[str] = ()) -> dict[str, Any]:
    """The table `name` of a config file. Raises ValueError where it is none or lacks a field that it must hold."""
    table = config.get(name)
    if not isinstance(table, dict):
        raise ValueError(f"{where} must have a table {name}, got {table!r}")
    must_hold(table, needs, f"{where}, {name}")
    return table


def must_hold(config: Mapping[str, Any], names: Collection[str], where: str) -> None:
    if missing := sorted(name for name in names if config.get(name) is None):
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.__init__).parameters) if "__init__" in vars(cls) else []
