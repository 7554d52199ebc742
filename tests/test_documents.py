"""Documents: both READMEs have the same structure, links have targets, and the flags in commands exist."""
import functools
import importlib
import os
import re
import shlex
from collections import Counter

import pytest

from common.errors import OneLineParser
from common.flags import ROOT
from tests.test_modes import SECTIONS, Parsed, stop

ENGLISH, CHINESE = READMES = 'README.md', 'README.zh-CN.md'
NOT_OURS = {'.git', '.venv', '.pytest_cache', '.ruff_cache', '.device', 'output'}
FENCE = re.compile(r'^ *```.*?\n(.*?)^ *```$', re.M | re.S)
SPAN = re.compile(r'`([^`]+)`')
HEADING = re.compile(r'^(#+) +(.*)$', re.M)
LINK = re.compile(r'(!\[[^]]*)?]\(([^)\s]+)[^)]*\)')  # of an image, or of a link, whose text may be an image
SOURCE = re.compile(r'(?:src|srcset)="([^"]+)"')  # of an image in HTML, which a dark page shows another version of
COMMAND = re.compile(r'\b(?:python|torchrun .*?) ([a-z0-9_./]*\b(?:main|prepare)\.py)\b(.*)')  # not CHAPTER/main.py


def documents():
    """Return the paths of all Markdown files of the repository."""
    found = []
    for place, folders, names in os.walk(ROOT):
        folders[:] = set(folders) - NOT_OURS
        found += [os.path.relpath(os.path.join(place, name), ROOT) for name in names if name.endswith('.md')]
    return sorted(found)


def read(document):
    with open(os.path.join(ROOT, document), encoding='utf-8') as file:
        return file.read()


def without_blocks(text):
    return FENCE.sub('', text)


def without_code(text):
    """Return the text with empty code spans, so that nothing in them looks like Markdown."""
    return SPAN.sub('``', without_blocks(text))


# --- what both READMEs have in common, of each of their sections ---------------------------------------------------

def sections(text):
    """Return the text from each heading to the next."""
    fenced = FENCE.sub(lambda block: re.sub('.', ' ', block[0]), text)
    starts = [heading.start() for heading in HEADING.finditer(fenced)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


def level(section):
    return len(HEADING.match(section)[1])


def code_blocks(section):
    """Return the code blocks without their comments, which may be translated."""
    return [re.sub(r'(^|[ \t]+)#.*', '', block, flags=re.M) for block in FENCE.findall(section)]


def rows(section):
    """Return (number of cells, first code span, all code spans, sorted) of each table row."""
    lines = [line for line in without_blocks(section).splitlines() if line.startswith('|')]
    return [(SPAN.sub('', line).count('|') - 1, SPAN.findall(line)[:1], sorted(SPAN.findall(line))) for line in lines]


def links(section):
    """Return the targets of links and, marked with !, of images, except for links to the other language."""
    found = LINK.findall(without_code(section)) + [('!', target) for target in SOURCE.findall(without_code(section))]
    return sorted('!' * bool(image) + target for image, target in found if target not in READMES)


def numbers(section):
    """Return all numbers; '5.3 million' and '530 万' count as the same."""
    units = {'million': 1_000_000, '万': 10_000}
    return sorted(str(round(float(number) * units[unit])) if unit else number
                  for number, unit in re.findall(r'(\d+(?:[.,]\d+)*)(?:\s(million|万))?', section))


@pytest.mark.parametrize('part', [level, code_blocks, rows, links, numbers])
def test_both_readmes_have_the_same_structure(part):
    english, chinese = ([part(section) for section in sections(read(readme))] for readme in READMES)
    assert english == chinese


@pytest.mark.parametrize('readme, line', [(ENGLISH, 'English | [简体中文](README.zh-CN.md)'),
                                          (CHINESE, '[English](README.md) | 简体中文')])
def test_each_readme_links_to_the_other(readme, line):
    assert read(readme).splitlines()[2] == line


# --- links -------------------------------------------------------------------------------------------------------

@functools.cache
def anchors(document):
    """Return the anchors that GitHub generates for the headings of a document."""
    seen, found = Counter(), set()
    for _, title in HEADING.findall(without_blocks(read(document))):
        anchor = re.sub(r'[^\w\- ]', '', LINK.sub('', title).lower()).replace(' ', '-')
        found.add(f'{anchor}-{seen[anchor]}' if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


@pytest.mark.parametrize('document', documents())
def test_links_lead_somewhere(document):
    broken = []
    text = without_code(read(document))
    for target in [target for _, target in LINK.findall(text)] + SOURCE.findall(text):
        path, _, anchor = target.partition('#')
        if re.match('https?:', target):
            continue
        path = os.path.normpath(os.path.join(os.path.dirname(document), path)) if path else document
        if not os.path.exists(os.path.join(ROOT, path)) or anchor and anchor not in anchors(path):
            broken.append(target)
    assert not broken


# --- commands ----------------------------------------------------------------------------------------------------

def commands(document):
    """Return (script, arguments) for every command in a document that runs a main.py or prepare.py."""
    text = read(document)
    lines = [line for block in FENCE.findall(text) for line in block.replace('\\\n', ' ').splitlines()]
    lines += [' '.join(span.split()) for span in SPAN.findall(without_blocks(text))]
    parts = [COMMAND.search(part) for line in lines for part in line.split('&&')]
    return [(script_of(document, part[1]), shlex.split(part[2], comments=True)) for part in parts if part]


def script_of(document, path):
    """Return the path of a script, relative to the folder of the document or else to the root."""
    beside = os.path.normpath(os.path.join(os.path.dirname(document), path))
    return beside if os.path.exists(os.path.join(ROOT, beside)) else path


@functools.cache
def parser_of(script):
    """Return the parser of a script, before anything is parsed."""
    module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneLineParser, 'parse_args', stop)
        with pytest.raises(Parsed) as caught:
            module.main()
    return caught.value.args[0]


@pytest.mark.parametrize('document', [*READMES, *(f'{section}/README.md' for section in SECTIONS)])
def test_documents_have_commands(document):
    assert len(commands(document)) > 3


@pytest.mark.parametrize('document', [document for document in documents() if commands(document)])
def test_commands_have_flags_that_exist(document, capsys):
    for script, arguments in commands(document):
        parser = parser_of(script)
        typed = {argument for argument in arguments if argument.startswith('--')}
        assert typed <= set(parser._option_string_actions), (script, arguments)  # argparse takes shorter ones, too
        try:
            parser.parse_args(arguments)
        except SystemExit:
            pytest.fail(f'{script} {shlex.join(arguments)}: {capsys.readouterr().err}')
