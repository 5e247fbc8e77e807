"""Fields of a model's config that the installed library does not know: ignoring them would change values unseen."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

# Written by the libraries into every config, or about generating text: nothing that features depend on.
HARMLESS = frozenset(
    "architectures auto_map do_sample dtype max_length model_type temperature tokenizer_class top_k top_p torch_dtype "
    "transformers_version use_cache bos_token_id eos_token_id pad_token_id".split()
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


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.__init__).parameters) if "__init__" in vars(cls) else []
