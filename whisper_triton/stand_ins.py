"""Stand-ins for what transformers' `_prepare_generation_config` reads: it gives the same from them, in less of the host's time.

The GPU has nothing to do meanwhile. In a call of `generate` transformers copies Whisper's configuration three times with
`copy.deepcopy`, which calls a Python function for each of its hundred languages and its suppressed tokens.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig

_ATOMS = frozenset((type(None), bool, int, float, str))


class StandIn:
    """An object as another but for some attributes."""

    def __init__(self, of: object, **attributes: object) -> None:
        vars(self).update(attributes, _of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


class ConfigStandIn(StandIn):
    """A `GenerationConfig` that is copied sooner: lists and dicts of numbers and words as a whole, all else as stock does."""

    def to_dict(self) -> dict[str, Any]:
        """What the configuration's own returns."""
        others, plain = _divide(self._of)
        return plain | others.to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> GenerationConfig:
        others, plain = _divide(self._of)
        copied = copy.deepcopy(others, memo)
        vars(copied).update(plain)
        return copied


def stand_in(config: Any) -> Any:
    """`config`, or a stand-in for it where nobody has given it other ways to be copied."""
    own_ways = type(config) is not GenerationConfig or "to_dict" in vars(config) or "__deepcopy__" in vars(config)
    return config if own_ways else ConfigStandIn(config)


def _divide(config: GenerationConfig) -> tuple[GenerationConfig, dict[str, Any]]:
    """A configuration with some of the attributes of `config`, and copies of the others."""
    others, plain = GenerationConfig.__new__(GenerationConfig), {}
    for name, value in vars(config).items():
        if name.startswith("_"):  # transformers' own, some of which `to_dict` leaves out
            vars(others)[name] = value
        elif type(value) in _ATOMS:
            plain[name] = value
        elif _is_plain(value):
            plain[name] = value.copy()
        else:
            vars(others)[name] = value
    return others, plain


def _is_plain(value: object) -> bool:
    """Whether `value` is a list or a dict of numbers and words alone."""
    if type(value) is dict:
        return _ATOMS.issuperset(map(type, value)) and _ATOMS.issuperset(map(type, value.values()))
    return type(value) is list and _ATOMS.issuperset(map(type, value))
