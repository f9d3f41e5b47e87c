"""Folders, modules, imports and function lengths of a package, read from its source.

    python tests/package_structure.py fliqs_jax

prints them as a table; another folder, of an older version say, may be named instead.
"""

import ast
from collections.abc import Iterator, Mapping
import functools
import pathlib
import sys

LONG = 60  # lines of a function, from which on it should be split


class Source:
  """The modules of a package by their dotted names, parsed.

  Attributes:
    package: the package's name.
    trees: the syntax tree of each module; a folder's `__init__` has the folder's name.
  """

  def __init__(self, package: str, sources: Mapping[str, str]):
    self.package = package
    self.trees = {name: ast.parse(text) for name, text in sources.items()}

  @classmethod
  def read(cls, folder: pathlib.Path) -> 'Source':
    """Returns the source in a package's folder."""
    sources = {}
    for path in sorted(folder.rglob('*.py')):
      parts = (folder.name, *path.relative_to(folder).with_suffix('').parts)
      parts = parts[:-1] if parts[-1] == '__init__' else parts
      sources['.'.join(parts)] = path.read_text()
    return cls(folder.name, sources)

  def imports(self, module: str) -> set[str]:
    """Returns the dotted names of all that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(self.trees[module]):
      if isinstance(node, ast.Import):
        found |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f'{module} has a relative import'
        names = {f'{node.module}.{alias.name}' for alias in node.names}
        # A folder of which modules are taken is not itself imported by that.
        found |= names if names <= set(self.trees) else {node.module, *names}
    return found

  def inner_imports(self, module: str) -> set[str]:
    """Returns the modules of the package that one of them imports."""
    return self.imports(module) & set(self.trees)

  def folder(self, module: str) -> str:
    """Returns the folder of a module in the package; empty for the package's own."""
    parts = module.split('.')[1:]
    is_folder = any(other.startswith(f'{module}.') for other in self.trees)
    return parts[0] if parts and (is_folder or len(parts) > 1) else ''

  def longest_chain(self) -> list[str]:
    """Returns the longest chain of modules of which each imports the next.

    Raises:
      ValueError: where modules import each other; it names them.
    """

    @functools.cache
    def chain(module):
      if module in entered:
        raise ValueError(f'an import cycle: {" -> ".join([*entered, module])}')
      entered.append(module)
      below = [chain(other) for other in sorted(self.inner_imports(module))]
      entered.pop()
      return [module, *max(below, key=len, default=[])]

    entered = []
    return max(map(chain, self.trees), key=len)

  def functions(self) -> Iterator[tuple[str, int]]:
    """Yields the name and the lines of every function."""
    for module, tree in self.trees.items():
      for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
          yield f'{module}.{node.name}', node.end_lineno - node.lineno + 1


def table(source: Source) -> str:
  """Returns the structure of a package in lines of text."""
  counts = {}
  for module in source.trees:
    counts.setdefault(source.folder(module) or '(top)', []).append(module)
  folders = ', '.join(f'{name} {len(modules)}' for name, modules in counts.items())
  chain = source.longest_chain()
  long = [f'{name} {lines}' for name, lines in source.functions() if lines > LONG]
  rows = {
    'folders': len(counts.keys() - {'(top)'}),
    'modules': f'{len(source.trees)} ({folders})',
    'longest import chain': f'{len(chain)} ({" -> ".join(chain)})',
    f'functions over {LONG} lines': f'{len(long)} ({", ".join(long)})',
  }
  return '\n'.join(f'{name}: {value}' for name, value in rows.items())


if __name__ == '__main__':
  print(table(Source.read(pathlib.Path(sys.argv[1]).resolve())))
