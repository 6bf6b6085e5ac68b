"""Objects that a policy names by a symbol: their addresses, out of the symbols of the machine.

Those of modules, and all for which a vCPU or a CR3 is given, are looked up in the guest's page tables.
"""

from __future__ import annotations

from engine.errors import InvalidValue
from engine.machine import VirtualMachine
from engine.symbols.placement import by_tables, located, only
from engine.symbols.stored import Symbols
from service.api.protection.policies import ObjectRequest, ProtectionRequest, no_symbols
from service.problems import InvalidDocument

ASSUMED = "size assumed: up to the next symbol"


def with_addresses(policy: ProtectionRequest, machine: VirtualMachine) -> ProtectionRequest:
    """The policy with an address for each object that has a symbol. Raises InvalidDocument, which names the object."""
    if all(item.symbol is None for item in policy.objects):
        return policy
    symbols = machine.symbols.all()
    objects = [_placed(item, f"objects[{position}]", symbols) for position, item in enumerate(policy.objects)]
    return policy.model_copy(update={"objects": objects})


def _placed(item: ObjectRequest, where: str, symbols: Symbols | None) -> ObjectRequest:
    if item.symbol is None:
        return item
    if symbols is None:
        raise no_symbols(where, item.symbol)
    for name in ("gpa", "gva"):
        if getattr(item, name) is not None:
            raise InvalidDocument("must be left out where `symbol` says the place", field=f"{where}.{name}")
    try:
        gva, known = only(symbols.table, item.symbol)
        walked = item.vcpu is not None or item.cr3 is not None or by_tables(symbols.placement, gva)
        gpa = None if walked else located(symbols.table, symbols.placement, item.symbol)[1]
    except InvalidValue as error:
        raise InvalidDocument(error.rule, field=f"{where}.symbol", value=item.symbol) from None
    size = known - item.offset if item.size is None else item.size
    if item.size is None and size <= 0:
        rule = (
            "is required: nothing says how large the symbol is" if not known else f"is required: it has {known} bytes"
        )
        raise InvalidDocument(rule, field=f"{where}.size")
    assumed = item.size is None and symbols.table.find(item.symbol)[0].assumed
    return item.model_copy(
        update={
            "name": item.name if item.name is not None else item.symbol,
            "symbol": None,
            "offset": 0,
            "gva": (gva + item.offset) % (1 << 64),
            "gpa": None if gpa is None else gpa + item.offset,
            "vcpu": item.vcpu or 0 if walked else None,
            "size": size,
            "about": item.about or (ASSUMED if assumed else None),
        }
    )
