"""Adds BADGE to PEFT's closed list of tuner types. The only module that touches private parts of PEFT's registry.

`peft.PeftType` is an `enum.Enum`, and everything in PEFT (and in transformers' PEFT integration) asks it for `.value`
and for membership, so BADGE has to be a real member: a plain string works for most calls and breaks some.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import register_peft_method

NAME = "BADGE"
PREFIX = "badge_"


def add_peft_type(name: str) -> PeftType:
    """Returns the member `name` of `PeftType`, adding it when it is not there yet.

    The member survives pickling, `copy.deepcopy`, `PeftType(name)`, `PeftType[name]` and iteration.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__dict__.update(__objclass__=PeftType, _sort_order_=len(PeftType.__members__))
    type.__setattr__(PeftType, name, member)  # EnumMeta refuses a plain setattr of a member
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Makes `get_peft_model` and `PeftModel.from_pretrained` know BADGE. Calling it again does nothing.

    Raises:
        KeyError: another tuner type has already taken the prefix `badge_` or the name BADGE.
    """
    peft_type = add_peft_type(NAME)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is config_cls:
        return
    if known is not None:
        raise KeyError(
            f"PEFT already has a method called {NAME!r}, registered with {known.__module__}.{known.__qualname__}. "
            "Import only one of the two packages in a process."
        )
    # PEFT compares the new prefix with the wrong side of its mapping, so it never notices a clash.
    for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if prefix == PREFIX and other != peft_type:
            raise KeyError(
                f"The parameter prefix {PREFIX!r} is already taken by the PEFT method {str(other.value)!r}: "
                "the two cannot be used in one process, since PEFT tells adapters apart by their prefix."
            )
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
