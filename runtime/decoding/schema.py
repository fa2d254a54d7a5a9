"""JSON schemas as answers are held to them: open parts are closed, so that a small model finds its end.

- An object has the keys that its schema names, at every depth, unless the schema itself describes other keys. An
  object with a schema that names none is a mapping, and stays open.
- A number has at most 16 digits before the point, or as many as its bounds, 9 after it, and no exponent.
- White space is that of Python's `json.dumps`, which models were trained on, or none for a model that was not.

Pure. Parts of one object may lie apart (`allOf`, `$ref` beside other keywords, the branches of `anyOf`): each is closed
to the keys of all. A part that lies behind a `$ref` is copied there, within limits; beyond these it stays open.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

MAX_DIGITS = 16
DECIMALS = 1e-9
MAX_NESTING = 100
MAX_COPIES, MAX_COPIED_BYTES = 256, 256 << 10
MAX_PARTS = 32
MAX_KEYS = 1000
_ANY = "deskside-any"
# What of a schema changes nothing that may be answered.
_REMARKS = {
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    "nullable",
}
_ROOT_ONLY = {"$schema", "$id", "$defs", "definitions", "x-guidance"}
_BOUNDS = {"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_KEYS = ("properties", "required", "patternProperties")
_BRANCHES = ("anyOf", "oneOf")
_CONDITIONAL = ("if", "then", "else")
_LARGEST_INTEGER = (1 << 63) - 1

Schema = dict[str, Any]


def closed(source: str, *, compact: bool = False, strict: bool = False) -> str:
    """The schema in `source` with what it leaves open closed, and with the options that llguidance reads in it.

    `compact` is without white space; `strict` lets llguidance refuse what it cannot enforce.
    """
    root = json.loads(source)
    if isinstance(root, bool):
        root = {} if root else {"enum": []}
    schema = _Closing(root).closed()
    separators = (",", ":") if compact else (", ", ": ")
    options = {"whitespace_flexible": False, "item_separator": separators[0], "key_separator": separators[1]}
    own = schema.get("x-guidance", {})
    schema["x-guidance"] = {**options, **own, "lenient": not strict} if isinstance(own, dict) else own
    return json.dumps(schema, ensure_ascii=False)


def without_unusable(source: str, usable: Callable[[str], bool]) -> tuple[str, list[str]]:
    """The schema without patterns that are not `usable` and references to other documents, and what was left out."""
    root = json.loads(source)
    lost: dict[str, None] = {}
    for node in _objects(root):
        if isinstance(pattern := node.get("pattern"), str) and not usable(pattern):
            del node["pattern"]
            lost[f"pattern {pattern[:40]}"] = None
        for pattern in [name for name in _object(node, "patternProperties") if not usable(name)]:
            del node["patternProperties"][pattern]
            lost[f"patternProperties {pattern[:40]}"] = None
        if isinstance(reference := node.get("$ref"), str) and not reference.startswith("#"):
            del node["$ref"]
            lost[f"$ref {reference[:40]}"] = None
    return json.dumps(root, ensure_ascii=False), list(lost)


@dataclass(slots=True)
class _Keys:
    """The keys that the parts of one object name, and those that patterns do; `said`: a part rules on all others."""

    names: dict[str, None] = field(default_factory=dict)
    patterns: dict[str, None] = field(default_factory=dict)
    said: bool = False

    def __or__(self, other: "_Keys") -> "_Keys":
        return _all((self, other))


class _Closing:
    """One schema while it is closed, part by part, in place."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._source = copy.deepcopy(root)
        self._seen: set[int] = set()
        self._pending: list[Schema] = []
        self._shared: dict[str, str] = {}
        self._copies, self._copied_bytes = 0, 0
        every = list(_objects(root))
        # Within a part that has an address of its own a reference to the root would mean another place.
        self._shares = not any("$id" in node for node in every if node is not root)
        self._limit = _limit(every)

    def closed(self) -> Schema:
        """The whole schema."""
        schema: Schema = self._close(self._root, None, 0)
        while self._pending:
            self._close(self._pending.pop(), None, 0)
        if schema is not self._root:
            schema = {name: self._root[name] for name in _ROOT_ONLY & set(self._root)} | schema
        if self._shared:
            schema["$defs"] = _object(schema, "$defs") | {name: json.loads(text) for text, name in self._shared.items()}
        return schema

    def _close(self, node: Any, beside: _Keys | None, depth: int) -> Any:
        """The part `node`, closed; `beside` are the keys of the other parts of the same object, if it has others."""
        if node is True and beside is None:
            node = {}
        if not isinstance(node, dict) or id(node) in self._seen or depth > MAX_NESTING:
            return node
        self._seen.add(id(node))
        says = set(node) - _REMARKS - (_ROOT_ONLY if node is self._root else set())
        self._named(node, ("$defs", "definitions"), depth)
        if beside is None and not says:
            return self._anything() or node
        self._inline(node, says, beside)
        _unfold_conditions(node)
        known, everything = self._parts(node, beside, depth)
        is_object = any(name in node for name in _KEYS)
        if node.get("unevaluatedProperties") is False and known.names and not everything.said:
            del node["unevaluatedProperties"]  # which is what closing the parts comes to
        self._children(node, depth)
        if is_object:
            _close_keys(node, everything)
            if beside is None and not {"type", "enum", "const", *_BRANCHES} & set(node):
                node["type"] = "object"  # as a schema that names properties means it
        elif beside is None and not known.names:
            self._open(node)
        return self._bounded(node)

    def _parts(self, node: Schema, beside: _Keys | None, depth: int) -> tuple[_Keys, _Keys]:
        """Close what lies beside the node's own keywords, each to the keys of all that hold together with it.

        Returns the keys that are known without the branches, and with all of them.
        """
        known = self._gather(node, branches=False) | (beside or _Keys())
        branches = {name: [self._gather(item) for item in _listed(node, name)] for name in _BRANCHES}
        of_list = {name: _all(keys) for name, keys in branches.items()}
        everything = _all([known, *of_list.values()])
        parts = _listed(node, "allOf")
        alone = beside is None and len(parts) == 1 and not set(node) - _REMARKS - _ROOT_ONLY - {"allOf"}
        for place, part in enumerate(parts):
            parts[place] = self._close(part, None if alone else everything, depth + 1)
        for name, gathered in branches.items():
            rest = _all([known, *(keys for other, keys in of_list.items() if other != name)])
            independent = beside is None and not (rest.names or rest.patterns or rest.said)
            items = _listed(node, name)
            for place, item in enumerate(items):
                items[place] = self._close(item, None if independent else rest | gathered[place], depth + 1)
        return known, everything

    def _children(self, node: Schema, depth: int) -> None:
        """Close the parts that describe other values than the node does."""
        self._named(node, ("properties", "patternProperties"), depth)
        for name in ("items", "additionalProperties", "additionalItems"):
            if name in node and node[name] is not False:
                node[name] = self._close(node[name], None, depth + 1)
        for name in ("prefixItems", "items"):
            items = _listed(node, name)
            for place, item in enumerate(items):
                items[place] = self._close(item, None, depth + 1)

    def _named(self, node: Schema, keywords: Sequence[str], depth: int) -> None:
        for keyword in keywords:
            if isinstance(schemas := node.get(keyword), dict):
                for name, schema in schemas.items():
                    schemas[name] = self._close(schema, None, depth + 1)

    def _gather(self, node: Any, *, branches: bool = True, seen: set[str] | None = None, depth: int = 0) -> _Keys:
        """The keys that `node` names, and all parts of the same object."""
        if not isinstance(node, dict) or depth > MAX_PARTS:
            return _Keys()
        names = {str(name): None for name in (node["required"] if isinstance(node.get("required"), list) else ())}
        keys = _Keys(dict.fromkeys(_object(node, "properties")) | names)
        keys.patterns = dict.fromkeys(_object(node, "patternProperties"))
        keys.said = "additionalProperties" in node or node.get("unevaluatedProperties", False) is not False
        parts = [*_listed(node, "allOf"), *(node.get(name) for name in _CONDITIONAL)]
        parts += [*_object(node, "dependentSchemas").values()]
        for name in _BRANCHES if branches else ():
            parts += _listed(node, name)
        reference = node.get("$ref")
        seen = set() if seen is None else seen
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            parts.append(_resolved(self._source, reference))
        return _all([keys, *(self._gather(part, seen=seen, depth=depth + 1) for part in parts)])

    def _inline(self, node: Schema, says: set[str], beside: _Keys | None) -> None:
        """Put a copy of what `node` refers to beside its other keywords, if it has any; close it where it is if not."""
        reference = node.get("$ref")
        if not isinstance(reference, str):
            return
        if says == {"$ref"} and beside is None:
            if isinstance(target := _resolved(self._root, reference), dict):
                self._pending.append(target)
            return
        target = _resolved(self._source, reference)
        n_bytes = len(json.dumps(target))
        if isinstance(target, dict) and self._copies < MAX_COPIES and self._copied_bytes + n_bytes <= MAX_COPIED_BYTES:
            self._copies, self._copied_bytes = self._copies + 1, self._copied_bytes + n_bytes
            del node["$ref"]
            node["allOf"] = [copy.deepcopy(target), *_listed(node, "allOf")]

    def _open(self, node: Schema) -> None:
        """Let any value stand for what a mapping or an array leaves open."""
        kinds = _kinds(node)
        anything = self._anything()
        if anything and "object" in kinds:
            node.setdefault("additionalProperties", anything)
        if anything and "array" in kinds:
            node.setdefault("items", anything)

    def _bounded(self, node: Schema) -> Schema:
        """The node with bounds on its numbers."""
        kinds = _kinds(node)
        if not {"integer", "number"} & kinds or "enum" in node or "const" in node:
            return node
        largest = min(self._limit, _LARGEST_INTEGER) if "integer" in kinds else self._limit
        for bound, exclusive, value in (
            ("minimum", "exclusiveMinimum", -largest),
            ("maximum", "exclusiveMaximum", largest),
        ):
            if bound not in node and type(node.get(exclusive)) not in (int, float):
                node[bound] = value
        if "number" in kinds:
            node.setdefault("multipleOf", DECIMALS)
        alone = {name: value for name, value in node.items() if name not in _REMARKS}
        return self._share(alone) if node is not self._root and set(alone) <= _BOUNDS else node

    def _anything(self) -> Schema:
        """A reference to any value, its numbers bounded; empty where that cannot be shared."""
        if not self._shares:
            return {}
        this = {"$ref": f"#/$defs/{_ANY}"}
        number = {"type": "number", "minimum": -self._limit, "maximum": self._limit, "multipleOf": DECIMALS}
        kinds = [{"type": kind} for kind in ("string", "boolean", "null")]
        either = [{"type": "object", "additionalProperties": this}, {"type": "array", "items": this}, *kinds, number]
        self._shared[json.dumps({"anyOf": either})] = _ANY
        return this

    def _share(self, schema: Schema) -> Schema:
        """A reference to the schema, which is compiled once however often it is named: that of a number takes 4 ms."""
        if not self._shares:
            return schema
        name = self._shared.setdefault(json.dumps(schema), f"deskside-number-{len(self._shared)}")
        return {"$ref": f"#/$defs/{name}"}


def _unfold_conditions(node: Schema) -> None:
    """Give an object the keys that hold under a condition, since the condition itself cannot be enforced."""
    found: dict[str, list[Any]] = {}
    for part in (*(node.get(name) for name in _CONDITIONAL[1:]), *_object(node, "dependentSchemas").values()):
        for name, schema in _object(part, "properties").items():
            found.setdefault(name, []).append(copy.deepcopy(schema))
    if new := {name: schemas for name, schemas in found.items() if name not in _object(node, "properties")}:
        either = {name: schemas[0] if len(schemas) == 1 else {"anyOf": schemas} for name, schemas in new.items()}
        node["properties"] = _object(node, "properties") | either


def _close_keys(node: Schema, keys: _Keys) -> None:
    if keys.said or len(keys.names) > MAX_KEYS:
        return
    own = _object(node, "properties")
    node["properties"] = own | {name: True for name in keys.names if name not in own}
    if keys.patterns:
        own = _object(node, "patternProperties")
        node["patternProperties"] = own | {pattern: True for pattern in keys.patterns if pattern not in own}
    node["additionalProperties"] = False


def _limit(nodes: Sequence[Schema]) -> int:
    """The largest number of as many digits as numbers may have: one more than in any bound, and at least MAX_DIGITS."""
    bounds = (abs(node[name]) for node in nodes for name in _BOUNDS if type(node.get(name)) in (int, float))
    digits = [len(str(int(bound))) + 1 for bound in bounds if bound <= _LARGEST_INTEGER]
    return int(10 ** max([MAX_DIGITS, *digits])) - 1


def _all(several: Iterable[_Keys]) -> _Keys:
    together = _Keys()
    for keys in several:
        together.names |= keys.names
        together.patterns |= keys.patterns
        together.said |= keys.said
    return together


def _kinds(node: Schema) -> set[str]:
    kinds = node.get("type")
    return {kind for kind in (kinds if isinstance(kinds, list) else (kinds,)) if isinstance(kind, str)}


def _object(node: Any, name: str) -> Schema:
    value = node.get(name) if isinstance(node, dict) else None
    return value if isinstance(value, dict) else {}


def _listed(node: Schema, name: str) -> list[Any]:
    value = node.get(name)
    return value if isinstance(value, list) else []


def _resolved(root: Schema, reference: str) -> Any:
    """The part of the schema that a JSON pointer names; None if that is nothing here."""
    if not reference.startswith("#"):
        return None
    node: Any = root
    for step in unquote(reference[1:]).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and step.isascii() and step.isdigit() and int(step) < len(node):
            node = node[int(step)]
        else:
            node = node.get(step) if isinstance(node, dict) else None
    return node


def _objects(value: Any) -> Iterator[Schema]:
    """Every JSON object in the value, itself included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
        waiting += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
