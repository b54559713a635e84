"""What an adapter from elsewhere must be before anything is made of it: plain LoRA, of this base, key by key.

A field of adapter_config.json is either understood, or known to change nothing, or refused by its name: an adapter that
loads and means something else would train, and serve, silently wrong. Messages name fields and keys, for which text
from a file is shown only where it looks like a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from claas_store.errors import VersionInvalid

CONFIG: Final = "adapter_config.json"
ADAPTER: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."  # what PEFT puts before a module's name

# Fields that shape the adapter, which the worker reads as PEFT does.
USED_FIELDS: Final = frozenset({"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern"}) | {
    "alpha_pattern",
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
}
# Fields that change neither the forward pass nor the gradient, whatever they say.
FREE_FIELDS: Final = frozenset({"peft_type", "peft_version", "base_model_name_or_path", "revision"}) | {
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",  # named by default, and used only with megatron_config
    "qalora_group_size",  # used only with use_qalora
}
# Fields of which only some values are without effect.
PLAIN_VALUES: Final[Mapping[str, tuple[object, ...]]] = {
    "bias": ("none",),
    "task_type": (None, "CAUSAL_LM"),
    # PiSSA, OLoRA, LoftQ ... store adapters of a changed base.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
# What one rank, one alpha and a list of layers' names cannot say; a server that reads only these would be wrong.
PATTERN_FIELDS: Final = ("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules")

_MAX_PATTERNS = 256  # of ranks, and as many of alphas: Python's `re` keeps 512 compiled
_MAX_NAMES = 512  # in a list, each of which is looked for in every module's name
_MAX_PATTERN_CHARACTERS = 1024
_NAME_CHARACTERS = 64  # of a module; a repetition may end at each of them
_MAX_ALTERNATIVES = 8  # beside as many repetitions as there may be; more of them with fewer
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}(/[A-Za-z0-9_.-]{1,200})?")  # with one slash, a hub's id
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z0-9][\w.-]*")


def shown(name: object, otherwise: str = "a key that is no name") -> str:
    """A name from a file as a message may hold it."""
    return name if isinstance(name, str) and _NAME.fullmatch(name) else otherwise


def names_another_base(config: Mapping[str, Any], base_model: str) -> bool:
    """Whether the config names, by a hub's id, another base model; the path of a folder says nothing about it."""
    named = config.get("base_model_name_or_path")
    if not named or not base_model or named == base_model:
        return False
    return not isinstance(named, str) or bool(_HUB_ID.fullmatch(named))


def check_config(uri: str, config: Mapping[str, Any], base_model: str = "") -> None:
    """A config that `parse_config` read is of plain LoRA matrices on `base_model` (empty: any).

    Raises:
        VersionInvalid: another base, or a field whose effect would be lost; the message names it.
    """
    at = f"{uri}: {CONFIG}"
    if names_another_base(config, base_model):
        named = config["base_model_name_or_path"]
        what = shown(named, "with a name that cannot be shown")
        raise VersionInvalid(f"{at}: base_model_name_or_path is another model {what}: set spec.baseModel to it")
    for field, value in config.items():
        if field in PLAIN_VALUES:
            plain = value in PLAIN_VALUES[field]
        elif field == "auto_mapping":
            plain = value is None or _is_of_transformers(value)
        else:
            plain = not value or field in USED_FIELDS or (field in FREE_FIELDS and not isinstance(value, list | dict))
        if not plain:
            raise VersionInvalid(f"{at}: {shown(field)} is not supported: save the adapter without it")


def check_expressions(what: str, config: Mapping[str, Any]) -> None:
    """No regular expression in the config can keep a reader busy: PEFT matches each with the name of every module.

    Raises:
        VersionInvalid: one could; the message begins with `what` and names the field.
    """
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        if isinstance(names := config.get(field), list) and len(names) > _MAX_NAMES:
            raise VersionInvalid(f"{what}: {field} lists {len(names)}, at most {_MAX_NAMES} can be")
    for field in ("target_modules", "exclude_modules"):
        if isinstance(expression := config.get(field), str):  # a list holds plain names
            _check_expressions(f"{what}: {field}", [expression], 3)
    layers = config.get("layers_pattern")
    _check_expressions(f"{what}: layers_pattern", layers if isinstance(layers, list) else [layers], 1)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        numbers = isinstance(patterns, dict) and all(isinstance(value, int | float) for value in patterns.values())
        if not numbers or len(patterns) > _MAX_PATTERNS:
            raise VersionInvalid(f"{what}: {field} must be an object of at most {_MAX_PATTERNS} patterns and numbers")
        _check_expressions(f"{what}: {field}", patterns, 1)


def _check_expressions(what: str, expressions: Iterable[Any], most: int) -> None:
    """At most so many repetitions in each, none of a group, and not too many ways to match them all."""
    ways, most_ways = 0, _MAX_ALTERNATIVES * _NAME_CHARACTERS ** max(2, most)
    for expression in expressions:
        if not isinstance(expression, str):
            continue
        ways += _ways(expression)
        costly = len(re.findall(r"[*+{]", expression)) > most or re.search(r"\)[*+{]|\\[1-9]", expression)
        if costly or ways > most_ways or len(expression) > _MAX_PATTERN_CHARACTERS:
            raise VersionInvalid(f"{what} holds a pattern that is too costly to match")


def _ways(expression: str) -> int:
    """In how many ways a matcher that goes back may try an expression before it gives up, at most: each repetition may
    end at each character of a name, what is optional be there or not, and of each group any alternative be taken.
    """
    plain = re.sub(r"\\.", "x", expression)
    repetitions = len(re.findall(r"[*+{]", plain))
    options = len(re.findall(r"(?<![(*+?}])\?", plain))  # neither of `(?:` nor of a lazy `*?`
    ways: int = _NAME_CHARACTERS**repetitions << options
    open_groups = [1]
    for character in plain:
        if character == "(":
            open_groups.append(1)
        elif character == "|":
            open_groups[-1] += 1
        elif character == ")" and len(open_groups) > 1:
            ways *= open_groups.pop()
    return ways * math.prod(open_groups)


def check_patterns(uri: str, config: Mapping[str, Any]) -> None:
    """The config says nothing that `spec.lora` of a LoraAdapter cannot.

    Raises:
        VersionInvalid: it does; the message names the field.
    """
    for field in PATTERN_FIELDS:
        if config.get(field):
            raise VersionInvalid(
                f"{uri}: {CONFIG}: {field} is not supported: a LoraAdapter has one rank, alpha and list"
            )
    if isinstance(config.get("target_modules"), str):
        raise VersionInvalid(f"{uri}: {CONFIG}: target_modules must be a list of names, not a pattern")


def expected_shapes(shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, int]]:
    """Shape of each key of adapter_model.safetensors, for linear layers of these shapes (out, in)."""
    return {
        f"{PREFIX}{module}.lora_{side}.weight": shape
        for module, (rows, columns) in shapes.items()
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank)))
    }


def check_tensors(
    uri: str, tensors: Mapping[str, NDArray[np.float32]], expected: Mapping[str, tuple[int, int]]
) -> None:
    """The weights are the expected ones, each of its shape and finite.

    Raises:
        VersionInvalid: a key is missing, too many, of another shape, or not finite; the message names it.
    """
    at = f"{uri}: {ADAPTER}"
    if missing := sorted(expected.keys() - tensors.keys()):
        raise VersionInvalid(f"{at} lacks {missing[0]}{_more(missing)}, which spec.lora and the base model ask for")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise VersionInvalid(f"{at} holds {shown(extra[0])}{_more(extra)}, which no target of spec.lora has")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise VersionInvalid(f"{at}: {key} has the shape {tensors[key].shape}, the base model needs {shape}")
    check_finite(uri, tensors)


def check_finite(uri: str, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """No weight is NaN or infinite.

    Raises:
        VersionInvalid: one is; the message names its key.
    """
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise VersionInvalid(f"{uri}: {ADAPTER}: {shown(key)} holds values that are not finite")


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def _is_of_transformers(mapping: Any) -> bool:
    """PEFT imports the library that is named here when it is asked to find the base's class by itself."""
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if not isinstance(library, str) or not re.fullmatch(r"transformers(\.\w+)*", library):
        return False
    return all(isinstance(value, str | None) for value in mapping.values())
