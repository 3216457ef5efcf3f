"""Cases of a vector field that imports, or finds in a module, what it reads."""

from __future__ import annotations

import sys
import types

from tests.codegen.cases import Case, case


def module(name: str) -> types.ModuleType:
    made = types.ModuleType(name)
    made.k = 2.0  # type: ignore[attr-defined]
    made.__path__ = []  # type: ignore[attr-defined]
    sys.modules[name] = made
    return made


@case
def a_module_imported_within() -> Case:
    held = module("imported_within")

    def read() -> float:
        import imported_within

        return imported_within.k  # type: ignore[no-any-return]

    return read, lambda: setattr(held, "k", 3.0)


@case
def a_name_imported_within() -> Case:
    held = module("named_within")

    def read() -> float:
        from named_within import k

        return k  # type: ignore[no-any-return]

    return read, lambda: setattr(held, "k", 3.0)


@case
def a_module_of_a_package_imported_within() -> Case:
    package, part = module("package_within"), module("package_within.part")
    package.part = part  # type: ignore[attr-defined]

    def read() -> float:
        import package_within.part as part
        from package_within import part as again

        assert part is again
        return part.k  # type: ignore[no-any-return]

    return read, lambda: setattr(part, "k", 3.0)


@case
def a_module_that_the_package_does_not_name() -> Case:
    module("bare_package")
    part = module("bare_package.part")

    def read() -> float:
        from bare_package import part

        return part.k  # type: ignore[no-any-return]

    return read, lambda: setattr(part, "k", 3.0)


@case
def a_package_around_what_is_imported() -> Case:
    package = module("around_within")
    package.part = module("around_within.part")  # type: ignore[attr-defined]

    def read() -> float:
        import around_within.part

        return around_within.k  # type: ignore[no-any-return]

    return read, lambda: setattr(package, "k", 3.0)


@case
def a_module_imported_within_a_function_within() -> Case:
    held = module("imported_deep_within")

    def read() -> float:
        def inner() -> float:
            import imported_deep_within

            return imported_deep_within.k  # type: ignore[no-any-return]

        return inner()

    return read, lambda: setattr(held, "k", 3.0)


@case
def a_module_imported_from_its_own_package() -> Case:
    package, sibling = module("relative_within"), module("relative_within.sibling")
    package.sibling = sibling  # type: ignore[attr-defined]
    space = {"__name__": "relative_within.part", "__package__": "relative_within"}
    exec("def read():\n    from . import sibling\n    return sibling.k", space)
    return space["read"], lambda: setattr(sibling, "k", 3.0)  # type: ignore[return-value]


@case
def a_module_that_an_object_holds() -> Case:
    held = types.SimpleNamespace(inner=module("held_by_an_object"))
    return lambda: getattr(held.inner, "k"), lambda: setattr(held.inner, "k", 3.0)  # noqa: B009
