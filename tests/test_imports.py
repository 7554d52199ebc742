"""Imports follow the table of CONTRIBUTING.md and have no cycle."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GANS = ('text2image', 'stackgan_v1', 'stackgan_v2')


def table():
    """Return {folder: the other folders that its files may import from}, as CONTRIBUTING.md has it."""
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    rows = text.partition('| folder | may import from |\n|---|---|\n')[2].partition('\n\n')[0].splitlines()
    cells = [[re.findall(r'`(\w+)`', cell) for cell in row.split('|')[1:-1]] for row in rows]
    return {folder: set(others) for folders, others in cells for folder in folders}


ARROWS = table()
FILES = [path for folder in ARROWS for path in sorted((ROOT / folder).rglob('*.py'))
         if 'output' not in path.parts]
NAMES = re.compile(r'word2vec|char_cnn|text2image|stackgan|stage.?i\b|stage1|nets?D\b|netG|lsun', re.IGNORECASE)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {name_of(path): path for path in FILES}


def imported_by(source):
    """Return the modules of this repository that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f'{node.module}.{alias.name}' if f'{node.module}.{alias.name}' in MODULES else node.module
                      for alias in node.names}
    return found & MODULES.keys()


def allowed(path):
    folder = path.relative_to(ROOT).parts[0]
    reads_sentences = folder in GANS and path.name == 'main.py'
    return {folder} | ARROWS[folder] | ({'char_cnn_rnn'} if reads_sentences else set())


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    folders = {module.partition('.')[0] for module in imported_by(path.read_text(encoding='utf-8'))}
    assert folders <= allowed(path), f'imports {sorted(folders - allowed(path))}'


def circle_in(graph):
    """Return a list of modules, each of which imports the next, and the last the first; or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module):]
        if module in done:
            return None
        path.append(module)
        found = next(filter(None, map(visit, sorted(graph[module]))), None)
        path.pop()
        done.add(module)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_imports_have_no_cycle():
    graph = {module: imported_by(path.read_text(encoding='utf-8')) - {module} for module, path in MODULES.items()}
    assert circle_in(graph) is None
    assert circle_in({'a': {'b'}, 'b': {'c'}, 'c': {'b'}}) == ['b', 'c']


@pytest.mark.parametrize('path', [path for path in FILES if path.relative_to(ROOT).parts[0] == 'common'],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_common_names_no_section(path):
    assert not NAMES.search(path.read_text(encoding='utf-8'))


def test_the_table_has_every_folder_of_code():
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob('*/*.py')}
    assert set(ARROWS) == folders - {'tests'} and ARROWS['text2image'] == {'common', 'data'}


def test_forbidden_imports_are_found():
    assert imported_by('from text2image import gan\nimport common.files') == {'text2image.gan', 'common.files'}
    assert not {'text2image'} <= allowed(ROOT / 'common' / 'files.py')
    assert 'char_cnn_rnn' in allowed(ROOT / 'text2image' / 'main.py')
    assert 'char_cnn_rnn' not in allowed(ROOT / 'text2image' / 'build_gan.py')
    assert NAMES.search("netsD = [model.netD]") and NAMES.search('for Stage-I')
