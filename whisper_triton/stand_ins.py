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
        others, plain = GenerationConfig.__new__(GenerationConfig), {}
        for name, value in vars(self._of).items():
            is_stocks = name.startswith("_") or not (type(value) in _ATOMS or _is_plain(value))  # some are left out
            (vars(others) if is_stocks else plain)[name] = value
        return {name: value if type(value) in _ATOMS else value.copy() for name, value in plain.items()} | others.to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> GenerationConfig:
        config = self._of
        memo[id(config)] = copied = GenerationConfig.__new__(GenerationConfig)
        for name, value in vars(config).items():
            if type(value) in _ATOMS:
                pass
            elif id(value) not in memo and _is_plain(value):
                memo[id(value)] = value = value.copy()
            else:
                value = copy.deepcopy(value, memo)
            vars(copied)[name] = value
        return copied


# Where somebody has put another in its place, it is to be called.
_TO_DICT = GenerationConfig.to_dict


def stand_in(config: Any) -> Any:
    """`config`, or a stand-in for it where nobody has given it other ways to be copied."""
    kind = type(config)
    is_stocks = kind is GenerationConfig and kind.to_dict is _TO_DICT and not hasattr(kind, "__deepcopy__")
    is_own = is_stocks and not {"to_dict", "__deepcopy__"} & vars(config).keys()
    return ConfigStandIn(config) if is_own else config


def _is_plain(value: object) -> bool:
    """Whether `value` is a list or a dict of numbers and words alone."""
    if type(value) is dict:
        return _ATOMS.issuperset(map(type, value)) and _ATOMS.issuperset(map(type, value.values()))
    return type(value) is list and _ATOMS.issuperset(map(type, value))
