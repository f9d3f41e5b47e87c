"""What turns the repository's files into a site: the README, and links out of docs/.

Pages link to each other and to code by relative paths, as GitHub shows them. A link to
a file that does not exist is a warning, which ends a strict build.
"""

import logging
import os
import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / 'docs'
README = ROOT / 'README.md'

# A link's path, unless it stands in code or begins with a scheme or an anchor.
_LINK = re.compile(r'```.*?```|`[^`]*`|(?<=\]\()(?P<path>[^)#:\s]+)(?=[)#])', re.DOTALL)

_logger = logging.getLogger('mkdocs.hooks')


def on_files(files, config):
  """Adds the README as the first page."""
  content = README.read_text(encoding='utf-8')
  files.append(File.generated(config, 'index.md', content=content))
  return files


def on_page_markdown(markdown, page, config, files):
  """Leads a page's links to pages of the site, or to files on GitHub."""
  return follow(markdown, page.file.src_uri, config.repo_url)


def follow(markdown: str, page: str, repository: str) -> str:
  """Returns a page's text with its links as the site needs them.

  Args:
    markdown: the text, whose links are relative to the file that it stands in.
    page: the page's path in `docs/`; `index.md` is the README.
    repository: address of the repository.
  """
  source = README if page == 'index.md' else DOCS / page

  def followed(match):
    if not match['path']:
      return match[0]
    target = pathlib.Path(os.path.normpath(source.parent / match['path']))
    if not target.exists():
      name = source.relative_to(ROOT)
      _logger.warning('%s links to %s, which does not exist.', name, match['path'])
    if target == README:
      target = DOCS / 'index.md'
    if target.is_relative_to(DOCS):
      return os.path.relpath(target, (DOCS / page).parent)
    kind = 'tree' if target.is_dir() else 'blob'
    return f'{repository}/{kind}/main/{target.relative_to(ROOT)}'

  return _LINK.sub(followed, markdown)
