"""What a chat template expects of messages and requests, found in its syntax tree: it is a program, and says nothing else of itself."""

from __future__ import annotations

from typing import NamedTuple

from jinja2 import meta, nodes

GIVEN = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"})  # set by us


class Needs(NamedTuple):
    """What a template expects of messages, found in its syntax tree."""

    names: frozenset[str]  # variables, attributes and string constants: which fields and roles it knows
    parts: bool  # goes through a content that is a list of parts
    text_arguments: bool  # joins a call's arguments as text
    entries: bool  # goes through a call's arguments and doesn't ask first whether they are an object
    one_call: bool  # shows the first call of a message, and none behind it
    asks_none: bool  # asks whether a message's content is none
    calls_alone: bool  # shows calls of a message only where its content is none
    efforts: frozenset[str]  # texts that it compares `reasoning_effort` with
    switches: frozenset[str]  # variables that it reads and doesn't set itself, those that every prompt has left out


def needs_of(tree: nodes.Template) -> Needs:
    """What the template of this syntax tree expects; the tree is used up."""
    return Needs(
        names=_names(tree),
        parts=_goes_through_content(tree),
        text_arguments=_joins_arguments(tree),
        entries=_goes_through_arguments(tree),
        one_call=_takes_one_call(tree),
        asks_none=any(_asks_none(test) for test in tree.find_all(nodes.Test)),
        calls_alone=_shows_calls_alone(tree),
        efforts=_compared(tree, "reasoning_effort"),
        switches=frozenset(meta.find_undeclared_variables(tree)) - GIVEN,  # last, because it folds the tree's constants
    )


def _names(tree: nodes.Template) -> frozenset[str]:
    names = {node.name for node in tree.find_all(nodes.Name)} | {node.attr for node in tree.find_all(nodes.Getattr)}
    return frozenset(names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)})


def _compared(tree: nodes.Template, name: str) -> frozenset[str]:
    """The texts that the variable `name` is compared with."""
    found: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        leaves = [leaf for side in (compare.expr, *compare.ops) for leaf in (side, *side.find_all((nodes.Name, nodes.Const)))]
        if any(isinstance(leaf, nodes.Name) and leaf.name == name for leaf in leaves):
            found |= {leaf.value for leaf in leaves if isinstance(leaf, nodes.Const) and isinstance(leaf.value, str)}
    return frozenset(found)


def _field(node: nodes.Node) -> str | None:
    """The name in `message.content` and `message['content']`."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return None


def _goes_through_content(tree: nodes.Template) -> bool:
    """A loop over a message's content, or over a variable or a macro's argument that stands for it."""
    settings = [node for node in tree.find_all(nodes.Assign) if isinstance(node.target, nodes.Name) and _field(node.node) == "content"]
    carriers = {node.target.name for node in settings if isinstance(node.target, nodes.Name)}
    carriers |= {arg.name for macro in tree.find_all(nodes.Macro) for arg in macro.args if arg.name == "content"}
    loops = [node.iter for node in tree.find_all(nodes.For)]
    return any(_field(over) == "content" or (isinstance(over, nodes.Name) and over.name in carriers) for over in loops)


def _joins_arguments(tree: nodes.Template) -> bool:
    """`+ call.arguments +` or `{{ call.arguments }}` and nowhere a filter or a test on them: the template takes JSON text."""
    handled = any(
        any(_field(child) == "arguments" for child in node.iter_child_nodes())
        for node in tree.find_all((nodes.Filter, nodes.Test, nodes.Assign, nodes.For, nodes.Getattr))
    )
    return not handled and any(
        any(_field(child) == "arguments" for child in node.iter_child_nodes())
        for node in tree.find_all((nodes.Add, nodes.Concat, nodes.Output))
    )


def _goes_through_arguments(tree: nodes.Template) -> bool:
    """`call.arguments | items` or `call.arguments.items()`, or of a variable that stands for them, and no `is string` or `is mapping`."""
    carriers = {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and any(_field(part) == "arguments" for part in (node.node, *node.node.iter_child_nodes()))
    }

    def stands(node: nodes.Node | None) -> bool:
        return node is not None and (_field(node) == "arguments" or (isinstance(node, nodes.Name) and node.name in carriers))

    if any(stands(test.node) and test.name in ("string", "mapping") for test in tree.find_all(nodes.Test)):
        return False
    filtered = any(stands(node.node) and node.name in ("items", "dictsort") for node in tree.find_all(nodes.Filter))
    return filtered or any(stands(node.node) and node.attr in ("items", "keys", "values") for node in tree.find_all(nodes.Getattr))


def _takes_one_call(tree: nodes.Template) -> bool:
    """`message.tool_calls[0]`, and nowhere a loop over them."""
    first = any(
        _field(node.node) == "tool_calls" and isinstance(node.arg, nodes.Const) and node.arg.value == 0
        for node in tree.find_all(nodes.Getitem)
    )
    return first and not _loops_over_calls(tree)


def _loops_over_calls(tree: nodes.Node) -> list[nodes.For]:
    """Loops over a message's calls, or over what a filter makes of them."""
    fields = (nodes.Getattr, nodes.Getitem)
    return [
        loop for loop in tree.find_all(nodes.For) if any(_field(over) == "tool_calls" for over in (loop.iter, *loop.iter.find_all(fields)))
    ]


def _shows_calls_alone(tree: nodes.Template) -> bool:
    """Every loop over calls stands under `content is none` (DeepSeek V3 and R1 as they came out)."""
    branches = [nodes.Template(branch.body) for branch in tree.find_all(nodes.If) if _wants_none(branch.test)]
    alone = {id(loop) for branch in branches for loop in _loops_over_calls(branch)}
    loops = _loops_over_calls(tree)
    return bool(loops) and all(id(loop) in alone for loop in loops)


def _wants_none(test: nodes.Node) -> bool:
    """`message['content'] is none`, alone or with `and`."""
    if isinstance(test, nodes.And):
        return _wants_none(test.left) or _wants_none(test.right)
    return _asks_none(test)


def _asks_none(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Test) and node.name == "none" and _field(node.node) == "content"
