"""Entries of Python modules, read by ``ast``: nothing is imported or run.

A function with a docstring gives a passage of its signature and the paragraphs of its docstring that fit. A short
function gives one of its source without the docstring.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from inspect import cleandoc

from mm_rec.data.questions.entries import LONGEST_ANSWER, LONGEST_PASSAGE, Entry, Fact, join_lines, sentences
from mm_rec.data.questions.texts import entries_of_text

__all__ = ["entries_of_program"]

Function = ast.FunctionDef | ast.AsyncFunctionDef

_LONGEST_SIGNATURE = 160
_LONGEST_DEFAULT = 40
_FEWEST_WORDS, _MOST_LINES = 3, 10
_RETURNS = re.compile(r"(?:Returns?|Yields?)\b", re.I)
_RAISES = re.compile(r"\b[Rr]aises?\b.*\b[A-Z]\w*(?:Error|Exception|Warning)\b")
_SECTION = re.compile(r"(?:\w+:|:\w+.*|.*\n\s*[-=~]{3,}.*|>>>.*|\.\. .*)", re.S)
_PARAMETER = re.compile(r"^\s*(?::param (?:\w+ )?(\w+):|(\w+)(?: \([^)]*\))?:)[ \t]+(\S.*(?:\n[ \t]{6,}\S.*)*)", re.M)


def entries_of_program(source: str, module: str = "") -> Iterator[Entry]:
    """Yields the entries of a module's public functions and methods; none if it is no valid Python.

    Args:
        source: of the module.
        module: its name, for questions that bring no passage.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes and literals of a module that is only read
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
    lines = source.splitlines()
    yield from entries_of_text(ast.get_docstring(tree) or "")
    for node in tree.body:
        found = _class(node, f"{module}.{node.name}".lstrip(".")) if isinstance(node, ast.ClassDef) else None
        if found is not None:
            yield found
    for function, owner in _functions(tree):
        full_name = ".".join(filter(None, (module, owner, function.name)))
        for entry in (_documented(function, full_name), _short(function, full_name, lines)):
            if entry is not None:
                yield entry


def _functions(tree: ast.Module) -> Iterator[tuple[Function, str]]:
    """Yields public functions, and methods with the name of their class."""
    for node in tree.body:
        if isinstance(node, Function):
            yield from ((one, "") for one in (node,) if not one.name.startswith("_"))
        elif isinstance(node, ast.ClassDef):
            methods = (one for one in node.body if isinstance(one, Function) and not one.name.startswith("_"))
            yield from ((one, node.name) for one in methods)


def _class(node: ast.ClassDef, full_name: str) -> Entry | None:
    """The entry of a public class with the first paragraph of its docstring; None if that does not suit."""
    summary = join_lines(re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0])
    bases = ", ".join(map(ast.unparse, node.bases))
    head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    if node.name.startswith("_") or not _is_text(summary) or len(head) > _LONGEST_SIGNATURE:
        return None
    facts = [Fact("class", summary)]
    if bases:
        facts.append(Fact("bases", bases))
    return Entry(node.name, full_name, f'{head}\n    """{summary}"""', tuple(facts))


def _documented(function: Function, full_name: str) -> Entry | None:
    """The entry of a signature with its docstring; None if either does not suit."""
    docstring = ast.get_docstring(function)
    signature = _signature(function)
    if docstring is None or len(signature) > _LONGEST_SIGNATURE:
        return None
    paragraphs = [one for one in re.split(r"\n\s*\n", cleandoc(docstring)) if one.strip()]
    if not paragraphs or _SECTION.match(paragraphs[0]):
        return None
    summary = join_lines(paragraphs[0])
    if not _is_text(summary):
        return None
    facts = [Fact("does", summary), *_arguments(function)]
    passage = f'{signature}\n    """{summary}'
    for paragraph in paragraphs[1:]:
        described = _PARAMETER.findall(paragraph)
        text = paragraph if described else join_lines(paragraph)
        if ">>>" in text or len(passage) + len(text) > LONGEST_PASSAGE:
            break
        passage += f"\n    {text}"
        names = {argument.arg for argument in _all_arguments(function)}
        facts += [
            Fact("parameter", line, name)
            for one, other, text in described
            if (name := one or other) in names and _is_text(line := text.partition("\n")[0].strip())
        ]
    said = [one for line in passage.splitlines()[1:] for one in sentences(line.strip().removeprefix('"""'))]
    for kind, pattern in (("returns", _RETURNS), ("raises", _RAISES)):
        found = next((one for one in said if pattern.search(one) and _is_text(one)), None)
        if found is not None and (kind == "raises" or pattern.match(found)):
            facts.append(Fact(kind, found))
    return Entry(function.name, full_name, passage + '"""', tuple(facts))


def _short(function: Function, full_name: str, lines: list[str]) -> Entry | None:
    """The entry of a function's source; None if it is long, or has nothing to ask for."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body or function.end_lineno is None or function.end_lineno - body[0].lineno >= _MOST_LINES:
        return None
    code = "\n".join(lines[body[0].lineno - 1 : function.end_lineno])
    indent = len(code) - len(code.lstrip())
    code = "\n".join("    " + line[indent:] for line in code.splitlines())
    passage = f"{_signature(function)}\n{code}"
    if len(passage) > LONGEST_PASSAGE:
        return None
    nodes = [node for statement in body for node in ast.walk(statement)]
    if any(isinstance(node, Function | ast.ClassDef | ast.Lambda) for node in nodes):
        return None
    facts = []
    returned = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
    raised = [node.exc for node in nodes if isinstance(node, ast.Raise) and node.exc is not None]
    for kind, values in (("value", returned), ("exception", raised)):
        if len(values) != 1:
            continue
        value = values[0].func if kind == "exception" and isinstance(values[0], ast.Call) else values[0]
        if value.lineno != value.end_lineno or isinstance(value, ast.Constant):
            continue
        # the offsets count bytes
        text = lines[value.lineno - 1].encode()[value.col_offset : value.end_col_offset].decode()
        if len(text) <= LONGEST_ANSWER:
            facts.append(Fact(kind, text))
    if not facts:
        return None
    return Entry(function.name, full_name, passage, (*facts, *_arguments(function)))


def _signature(function: Function) -> str:
    returns = f" -> {ast.unparse(function.returns)}" if function.returns is not None else ""
    prefix = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    return f"{prefix} {function.name}({ast.unparse(function.args)}){returns}:"


def _all_arguments(function: Function) -> list[ast.arg]:
    """The parameters of a function but for ``self`` and ``cls``."""
    arguments = function.args
    several = [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *several]
    return found[1:] if found and found[0].arg in ("self", "cls") else found


def _arguments(function: Function) -> Iterator[Fact]:
    """What a signature tells: the parameters, and the default of each that has one."""
    shown = re.sub(r"^(?:self|cls)(?:: [^,]*)?(?:, |$)(?:/(?:, |$))?", "", ast.unparse(function.args))
    if _all_arguments(function) and len(shown) <= LONGEST_ANSWER // 2:
        yield Fact("parameters", shown)
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    first = len(positional) - len(arguments.defaults)
    pairs: list[tuple[ast.arg, ast.expr | None]] = [*zip(positional[first:], arguments.defaults, strict=True)]
    pairs += [*zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    for argument, value in pairs:
        default = "" if value is None else ast.unparse(value)
        if 0 < len(default) <= _LONGEST_DEFAULT:
            yield Fact("default", default, argument.arg)


def _is_text(text: str) -> bool:
    """Whether an answer reads like a line of text."""
    letters = sum(one.isalpha() or one.isspace() for one in text)
    is_text = len(text.split()) >= _FEWEST_WORDS and not text.startswith((":", "<", "|"))
    return is_text and len(text) <= LONGEST_ANSWER and letters >= 0.8 * len(text)
