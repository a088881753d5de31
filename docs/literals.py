"""A griffe extension: signatures show the choices of a `Literal` and not its alias."""

from typing import Any

import griffe


class Literals(griffe.Extension):
    """Puts `Literal["xla", "mosaic_gpu"]` where an annotation has `Implementation`."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for function in _functions(pkg):
            for parameter in function.parameters:
                parameter.annotation = _expand(parameter.annotation)


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
    if not isinstance(name.parent, griffe.Object):
        return None
    try:
        target = name.parent.modules_collection[name.canonical_path]
    except KeyError:
        return None
    if isinstance(target, griffe.Alias):
        target = target.final_target
    value = target.value if isinstance(target, griffe.Attribute) else None
    if isinstance(value, griffe.ExprSubscript) and str(value.left) == "Literal":
        return value
    return None
