"""The corpus that every machine has: functions of the running Python's own standard library, to be written anew.

A prompt is a function's signature and docstring, read from the library's source files; no module is imported or run.
"""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from specauf.errors import UserError

NAME = "python-stdlib"
# Tests and vendored copies: their docstrings say little of what a function does.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"})
# A docstring shorter than this says nothing; of a longer one the first paragraphs are enough of a task.
MIN_CHARACTERS, MAX_CHARACTERS = 20, 500


def stdlib_prompts(root: Path | None = None) -> list[str]:
    """Prompts that ask for each documented function, in an order that is fixed and varied.

    The order is by a hash of the prompt, so that the first N are a sample of the whole library and stay the same when
    the library grows a little.

    Args:
        root: directory of the library's sources; by default the running Python's.

    Raises:
        UserError: there are no sources, as in a Python whose library is a zip file.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    prompts = {prompt for prompt, _, _ in documented_functions(root)}
    if not prompts:
        raise UserError(f"corpus {NAME}: no Python sources under {root}: use a Python that has its .py files")
    return sorted(prompts, key=lambda p: hashlib.blake2b(p.encode(), digest_size=16).digest())


def documented_functions(root: Path) -> Iterator[tuple[str, ast.AST, Path]]:
    """Prompt, syntax tree and file of every documented function below a directory, file by file."""
    for path in sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts[:-1])):
        for prompt, node in _functions_of(path):
            yield prompt, node, path


def _functions_of(path: Path) -> Iterator[tuple[str, ast.AST]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # the library ships templates and deliberately broken files
    for node in _statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = shorten(ast.get_docstring(node, clean=True) or "")
            if MIN_CHARACTERS <= len(doc) <= MAX_CHARACTERS and '"""' not in doc:
                yield prompt_for(node, doc), node


def _statements(tree: ast.Module) -> list[ast.AST]:
    """In the order of `ast.walk`, which spends its time on expressions; no function is defined in one."""
    found: list[ast.AST] = [tree]
    for node in found:  # which grows meanwhile
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            found += getattr(node, part, ())
    return found


def shorten(doc: str) -> str:
    """The first paragraphs of a docstring that fit `MAX_CHARACTERS` together; at least the first one."""
    paragraphs = doc.strip().split("\n\n")
    kept = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(kept) + 2 + len(paragraph) > MAX_CHARACTERS:
            break
        kept += "\n\n" + paragraph
    return kept.strip()


def prompt_for(node: ast.FunctionDef | ast.AsyncFunctionDef, doc: str) -> str:
    """The question about one function: its signature and docstring, as code."""
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    body = "\n".join(f"    {line}".rstrip() for line in inspect.cleandoc(doc).splitlines())
    return (
        "Write a Python function.\n```python\n"
        f"{word} {node.name}({ast.unparse(node.args)}){returns}:\n"
        f'    """{body.strip()}"""\n```'
    )
