"""What makes two things the same: the content of values, the code that a function reaches, the bytes of files.

Results and runs are kept under these identities, so equal ones are never computed twice and edited ones never mistaken
for each other. Comments and docstrings are not code: polishing them keeps every result. Knows nothing of what is
stored, or where.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import numbers
import sys
import tokenize
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def canonical(value) -> str:
    """One text for one JSON value: keys sorted, floats in full."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(value) -> str:
    """sha256 (64 hex) of a JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


# --- values -----------------------------------------------------------------------------------------------------------


def plain(value, where: str, other: Callable | None = None):
    """`value` in JSON's own types: tuples become lists, NumPy scalars Python numbers of the same value.

    `other(value, where)` handles what is not JSON. Without it TypeError is raised, and says where in the value the
    trouble is.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]", other) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if unfit := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{where} has the key {unfit[0]!r}; keys must be strings")
        return {key: plain(item, f"{where}[{key!r}]", other) for key, item in value.items()}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return plain(value.item(), where, other)
    if other is not None:
        return other(value, where)
    raise TypeError(f"{where} is a {_type(value)}; use numbers, strings, booleans, None, or lists and dicts of these")


def identity(value, where: str):
    """A JSON value that is equal for equal arguments of a measured function, and different for different ones.

    Beyond JSON it knows tensors, arrays and modules (by content), dataclasses (by their fields), slices, functions (by
    name and code) and loaded models, which have both `.model` and `.fingerprint` (by fingerprint and dtype: hashing 16
    GB takes minutes). A `.fingerprint` alone is not enough: that of a direction says only which weights it belongs to.
    Raises TypeError, naming the argument, for anything else.
    """
    return plain(value, where, _rich)


def _rich(value, where: str):
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if isinstance(value, slice):
        return {"slice": identity([value.start, value.stop, value.step], where)}
    if inspect.isfunction(value):
        return {"function": f"{value.__module__}.{value.__qualname__}", "code": code_of(value)}
    if hasattr(value, "model") and hasattr(value, "fingerprint"):
        return {"model": value.fingerprint, "dtype": str(value.model.dtype)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"type": _type(value)} | {name: identity(item, f"{where}.{name}") for name, item in fields.items()}
    if torch and isinstance(value, torch.nn.Module):
        return {"type": _type(value), "state": identity(value.state_dict(), where)}
    if torch and isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return {"tensor": hashlib.sha256(raw).hexdigest(), "dtype": str(value.dtype), "shape": list(value.shape)}
    if numpy and isinstance(value, numpy.ndarray) and value.dtype != object:
        raw = hashlib.sha256(numpy.ascontiguousarray(value)).hexdigest()
        return {"array": raw, "dtype": str(value.dtype), "shape": list(value.shape)}
    raise TypeError(
        f"{where} is a {_type(value)}, which has no identity to keep a result under; pass what it was made from, "
        "and make it inside the function"
    )


def _type(value) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


# --- code -------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code_of(function: Callable) -> dict[str, str]:
    """Identities of the function's module and of all modules of its package that it reaches, by "package/module.py".

    The code is that which this process loaded, not what an editor has saved since. Files that the function reads are
    not seen: pass their content, or an object made from it, as an argument. Raises ValueError for a function that is
    not in a package: nobody could tell when a notebook's own function has changed.
    """
    home = function.__module__
    package = sys.modules[home.partition(".")[0]]
    if not hasattr(package, "__path__"):
        raise ValueError(
            f"{getattr(function, '__qualname__', function)} is defined in {home}; move it to a module of lib, "
            "so that an edit makes its results stale and other notebooks can use it"
        )
    return code(Path(package.__file__).parent, [Path(sys.modules[home].__file__)], _as_loaded)


def code(package: Path, roots: Iterable[Path], read: Callable[[Path], str] = _read) -> dict[str, str]:
    """Identities of the root files and of all that they import from the package, at any depth, by "package/module.py".

    Imports are followed by syntax, inside functions too; importlib calls are not seen. The package's own __init__.py
    does not count, since importing any module runs it: it must only pass names on. `read` gives the text of a file.
    """
    found, queue = {}, list(roots)
    while queue:
        path = queue.pop()
        if path in found or path == package / "__init__.py":
            continue
        source = read(path)
        found[path] = _identity_of_source(source)
        queue += imported(package, source, path.parent)
    names = {path: f"{package.name}/{path.relative_to(package).as_posix()}" for path in found}
    return {names[path]: found[path] for path in sorted(found)}


def imported(package: Path, source: str, folder: Path | None = None) -> set[Path]:
    """Files of `package` that `source` imports; a source in the package lies in `folder`, where `from .` starts."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, *parts = alias.name.split(".")
                found |= _files(package, package.joinpath(*parts), "*") if top == package.name else set()
        elif isinstance(node, ast.ImportFrom):
            top, *parts = (node.module or "").split(".")
            if node.level and folder:
                base = [folder, *folder.parents][node.level - 1]
                target = base / top / Path(*parts)
            elif top == package.name and not node.level:
                target = package.joinpath(*parts)
            else:
                continue
            found |= set().union(*(_files(package, target, alias.name) for alias in node.names))
    return found


def _files(package: Path, target: Path, name: str) -> set[Path]:
    """Files behind `from target import name`."""
    if target.with_suffix(".py").is_file() and target != package:
        return {target.with_suffix(".py")}
    here = {target / "__init__.py"} & set(target.glob("*.py"))
    if (target / f"{name}.py").is_file():
        return here | {target / f"{name}.py"}
    if (target / name / "__init__.py").is_file():
        return here | set((target / name).rglob("*.py"))
    # A name that __init__.py passes on, by whatever means: it comes from the modules that define it, else from any.
    modules = set(target.rglob("*.py"))
    return here | ({path for path in modules if name in _defined(_read(path))} or modules)


@functools.cache
def _defined(source: str) -> frozenset[str]:
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return frozenset(names)


@functools.cache
def _identity_of_source(source: str) -> str:
    return hashlib.sha256(essence(source).encode()).hexdigest()


def essence(source: str) -> str:
    """Python source without comments, docstrings and the blank lines between statements.

    Cut out of the text, not printed from a syntax tree: what is printed differs between Python versions.
    """
    lines, emptied = source.split("\n"), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            before = lines[text.lineno - 1].encode()[: text.col_offset]
            after = lines[text.end_lineno - 1].encode()[text.end_col_offset :]
            if not before.strip() and not after.strip():
                emptied.update(range(text.lineno - 1, text.end_lineno))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start[0] - 1, token.start[1]
        if token.type == tokenize.COMMENT:
            lines[row] = lines[row][:column].rstrip()
        if token.type in (tokenize.COMMENT, tokenize.NL) and not lines[row].strip():
            emptied.add(row)
    return "\n".join(line for row, line in enumerate(lines) if row not in emptied).rstrip("\n")


def _as_loaded(path: Path) -> str:
    """The text of a module of this package when the process started; with IPython's autoreload on, the text now."""
    reloading = any(name.endswith("extensions.autoreload") for name in sys.modules)
    return _read(path) if reloading else _AT_START.get(path) or _read(path)


_AT_START = {path: _read(path) for path in Path(__file__).parent.rglob("*.py")}
