"""A griffe extension: signatures show choices and defaults, and not their names."""

from typing import Any

import griffe


class Literals(griffe.Extension):
    """Puts `Literal["xla", "mosaic_gpu"]` where an annotation has `Implementation`.

    It also puts the value where a default is an attribute, `TransformerConfig.norm`.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for function in _functions(pkg):
            for parameter in function.parameters:
                parameter.annotation = _expand(parameter.annotation)
                if isinstance(parameter.default, griffe.ExprAttribute):
                    parameter.default = _value_of(parameter.default)


def _functions(module: griffe.Object) -> list[griffe.Function]:
    found = []
    for member in module.members.values():
        if isinstance(member, griffe.Function):
            found.append(member)
        elif isinstance(member, griffe.Module | griffe.Class):
            found += _functions(member)
    return found


def _expand(annotation: Any) -> Any:
    """The annotation, with the literals that it names in place of their names."""
    if isinstance(annotation, griffe.ExprName):
        return _literal_of(annotation) or annotation
    if isinstance(annotation, griffe.ExprBinOp):
        annotation.left = _expand(annotation.left)
        annotation.right = _expand(annotation.right)
    return annotation


def _literal_of(name: griffe.ExprName) -> griffe.ExprSubscript | None:
    target = _target_of(name)
    value = target.value if isinstance(target, griffe.Attribute) else None
    if isinstance(value, griffe.ExprSubscript) and str(value.left) == "Literal":
        return value
    return None


def _value_of(default: griffe.ExprAttribute) -> Any:
    """The value of an attribute of a class of ours, or the expression itself."""
    owner = default.first
    if not isinstance(owner, griffe.ExprName):
        return default
    target = _target_of(owner)
    field = target.members.get(str(default.last)) if target else None
    if isinstance(field, griffe.Attribute) and field.value is not None:
        return field.value
    return default


def _target_of(name: griffe.ExprName) -> Any:
    if not isinstance(name.parent, griffe.Object):
        return None
    try:
        target = name.parent.modules_collection[name.canonical_path]
    except KeyError:
        return None
    return target.final_target if isinstance(target, griffe.Alias) else target
