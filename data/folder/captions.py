"""Find the captions of pictures as people have them: text files, metadata.csv or metadata.jsonl, COCO's JSON files.

Each function returns `Captions`. One that reads lists raises UserError, with the line, if a list is not what it should
be; a single text file that cannot be used does not stop the conversion.
"""
import ast
import contextlib
import csv
import json
import os
import re
from collections import Counter, defaultdict, namedtuple
from functools import partial

from common.errors import UserError
from data.bounded_files import files_in, is_plain, normalized, read_json, read_text, shown, some
from data.converting import checked_captions, read_captions
from data.folder.pictures import SPLITS, paths_beside

EMPTY = ('nan', 'NaN', 'None', 'null', 'NULL', '<NA>')  # what pandas, Python and databases write for no value
METADATA = ('metadata.csv', 'metadata.jsonl')
JSON_BYTES = {'captions': 256 << 20, 'instances': 1 << 30}  # COCO's largest have 92 MB and 470 MB
LONGEST_CLASS = 200  # characters
LARGEST_AREA = 1e18  # pixels
YOLO = re.compile(r'\S+(\s+[-+]?\.?\d[\d.]*(e[-+]?\d+)?){4,}', re.IGNORECASE)  # a line of its boxes or polygons
STRING = r'''(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')'''
LIST = re.compile(rf'[\[(]\s*(?:(?:{STRING}|nan|NaN|None|null)[\s,]*)*[\])]')  # as Python, NumPy and JSON write it
COCO_SPLITS = {'train': 'train', 'val': 'test'}  # of captions_train2014.json: the authors test on COCO's val
WITH_TEST = {'train': 'train', 'val': 'valid', 'test': 'test'}  # if there is a captions_test*.json, which COCO has not
COLUMNS = ('file_name', 'text', 'class', 'split')
HOW = 'data/README.md says how captions can be given'

# Where captions are from; `of(picture)` returns the function that reads those of a picture; {file: class} and
# {file: split} of what is known about pictures beside; files that have captions, but are not pictures of the folder;
# the folder of NAME.txt, if captions are in such files; whether they are COCO's, whose folders are no classes.
Captions = namedtuple('Captions', 'source of classes splits absent folder is_coco', defaults=[None, False])


def find(pictures, given, folder, with_objects):
    """Return the `Captions` of pictures in `folder`, from the file or folder `given`.

    `with_objects` says whether COCO's instances_*.json in the same folder give the classes.
    """
    if os.path.isdir(given):
        files = list(filter(is_plain, files_in(given)))
        listed = [file for file in files if os.path.basename(file).lower() in METADATA]
        coco = [file for file in files
                if os.path.basename(file).startswith('captions_') and file.lower().endswith('.json')]
        # In a subfolder, as COCO has them, they count only if there is no metadata.
        coco = [file for file in coco if '/' not in file] or ([] if listed else coco)
        if coco:
            return read_coco(pictures, [os.path.join(given, file) for file in coco], with_objects)
        if listed:
            return read_metadata(pictures, given, listed, folder)
        path_of = paths_beside(given, '.txt')
        return Captions(f'text files in {given}', lambda picture: partial(read_text_file, path_of(picture)), {}, {},
                        set(), given)
    if not os.path.exists(given):
        raise UserError(f'--captions {given}: no such file or folder; {HOW}')
    if given.lower().endswith('.json'):
        return read_coco(pictures, [given], with_objects)
    if given.lower().endswith(('.csv', '.jsonl')):
        return read_metadata(pictures, os.path.dirname(given) or '.', [os.path.basename(given)], folder)
    raise UserError(f'--captions {given}: is neither a folder nor a .csv, .jsonl or .json file; {HOW}')


def read_text_file(path):
    """Return the captions in a text file, as `read_captions` does. Raises ValueError also if it holds YOLO's boxes."""
    captions = read_captions(path)
    if all(map(YOLO.fullmatch, captions)):
        raise ValueError('its text file holds boxes in YOLO format, not captions')
    if captions and captions[0].startswith(r'{\rtf'):
        raise ValueError('its text file is in rich text format; save it as plain text')
    return captions


def read_metadata(pictures, root, files, folder):
    """Return the `Captions` in metadata.csv or metadata.jsonl files, `files` in `root`.

    As Hugging Face's ImageFolder has it, `file_name` is the path of a picture from the file's folder, and `text` its
    caption; several lines of a picture are several captions. `class` may name its class, `split` its split. If no
    picture is there, `file_name` is the path from `folder`, that of the pictures, or from the same subfolder in it.
    """
    known = {normalized(picture.file): picture.file for picture in pictures}
    texts, classes, splits, absent, unread, empty = defaultdict(list), {}, {}, set(), set(), set()
    for place, count in Counter(map(os.path.dirname, files)).items():
        if count > 1:
            raise UserError(f'{os.path.join(root, place)}: has both metadata.csv and metadata.jsonl; keep only one')
    for file in files:
        path, beside = os.path.join(root, file), os.path.dirname(file)
        for number, row in read_rows(path, known):
            name, text, class_name, split = map(row.get, COLUMNS)
            unread |= row.keys() - set(COLUMNS)
            lines = text if isinstance(text, list) else [text]
            if not isinstance(name, str) or not name.strip() or not all(isinstance(line, str) for line in lines):
                quoted = ', in quotation marks if they contain commas' if path.lower().endswith('.csv') else ' as text'
                raise UserError(f'{path}: line {number} has no file_name or no text; give both{quoted}')
            empty |= {value for value in (*lines, class_name, split) if value in EMPTY}
            name = name.strip().replace('\\', '/')
            from_file = os.path.relpath(os.path.join(os.path.dirname(path), name), folder)
            from_pictures = os.path.normpath(os.path.join(beside, name))
            places = [normalized(place.replace(os.sep, '/')) for place in (from_file, from_pictures)]
            found = next((known[place] for place in places if place in known), None)
            if found is None:
                absent.add(places[-1])
                continue
            texts[found] += ['' if is_absent(line) else line for line in lines]
            if not is_absent(class_name):
                class_name = checked_class(class_name, f'{path}: line {number}')
                if classes.setdefault(found, class_name) != class_name:
                    raise UserError(f'{path}: line {number} gives {found} the class {class_name}, but an earlier line '
                                    f'gives it {classes[found]}; give one class')
            if not is_absent(split):
                split = SPLITS.get(str(split).strip().lower())
                if split is None or splits.setdefault(found, split) != split:
                    raise UserError(f'{path}: line {number}: the split of {found} must be train, validation or test, '
                                    f'and the same in all of its lines, not {shown(str(row["split"]))[:60]!r}')
    source = ', '.join(files[:3]) + ', ...' * bool(files[3:])
    join_lines(texts, source)
    unread -= {''}  # pandas writes its index without a name
    if empty:
        print(f'read as no value: cells with {some(empty)}')
    if unread:
        print(f'not read: the columns {some(unread)}')
    return Captions(source, lambda picture: partial(checked_captions, texts.get(picture.file, ())), classes, splits,
                    absent)


def read_rows(path, pictures):
    """Yield (line number, {column: value}) for each row of a .csv or .jsonl file. Raises UserError if it is neither.

    With the files `pictures`, a quotation mark that is not closed, so that a cell goes on over other rows, is noticed.
    """
    advice = 'give a file with file_name and text in each row'
    lines = read_text(path, advice).split('\n')
    is_csv = path.lower().endswith('.csv')
    return _csv_rows(path, lines, advice, pictures) if is_csv else _json_rows(path, lines, advice)


def _csv_rows(path, lines, advice, pictures):
    names = set(map(os.path.basename, pictures))
    reader, line = csv.DictReader((f'{line}\n' for line in lines), skipinitialspace=True, strict=True), 1

    def first_line():  # of the next row, which may have several
        return next((number for number in range(reader.line_num + 1, len(lines) + 1) if lines[number - 1].strip()), 0)

    try:
        while reader.fieldnames and not reader.fieldnames[-1]:  # Excel writes columns that once had something
            reader.fieldnames.pop()
        missing = [name for name in ('file_name', 'text') if name not in (reader.fieldnames or ())]
        if missing:
            found = shown(', '.join(map(str, reader.fieldnames or ['nothing'])))[:100]
            raise UserError(f'{path}: its first line has no column {" and no column ".join(missing)} (it has {found}); '
                            f'{advice}')
        repeated = [name for name, count in Counter(reader.fieldnames).items() if count > 1]
        if repeated:
            raise UserError(f'{path}: its first line has the column {shown(repeated[0])!r} twice; give one, and a row '
                            'for each caption')
        line = first_line()
        for row in reader:
            if any(row.pop(None, ())):
                raise UserError(f'{path}: line {line} has more cells than there are columns; put text with commas in '
                                'quotation marks')
            swallowed = names.intersection(
                normalized(re.split(r'[/\\]', cell)[-1].strip()) for text in row.values() if '\n' in (text or '')
                for inner in text.split('\n') if ',' in inner for cell in inner.split(','))
            if swallowed:
                raise UserError(f'{path}: line {line} has a cell that goes on over the row of {min(swallowed)}; close '
                                'its quotation mark')
            yield line, row | {'text': _listed(row['text'])}
            line = first_line()
    except csv.Error as error:
        raise UserError(f'{path}: line {line} is not CSV ({error}); {advice}') from error


def _listed(text):
    """Return the list of captions that a cell holds if it is one, written as by pandas or in JSON, else the cell."""
    if not text or not LIST.fullmatch(text):
        return text
    for read in (json.loads, lambda text: list(map(ast.literal_eval, re.findall(STRING, text)))):
        with contextlib.suppress(ValueError, SyntaxError):
            return [one for one in read(text) if isinstance(one, str)]  # not NaN and None
    return text


def _json_rows(path, lines, advice):
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError) as error:
            why = error if isinstance(error, _Repeated) else 'is not a JSON object'
            raise UserError(f'{path}: line {number} {why}; {advice}') from error
        if not isinstance(row, dict):
            raise UserError(f'{path}: line {number} is not a JSON object; {advice}')
        if 'text' in row:
            texts = row['text'] if isinstance(row['text'], list) else [row['text']]
            row['text'] = ['' if is_absent(text) else text for text in texts]
        yield number, row


class _Repeated(ValueError):
    """A key that an object of a JSON file has twice: of two values, one would be lost."""


def _without_repetition(pairs):
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise _Repeated(f'has {shown(name)[:60]!r} twice')
    return dict(pairs)


def join_lines(texts, source):
    """Replace the line breaks in the captions {file: captions} by spaces, and print how many captions had any."""
    several = [text for lines in texts.values() for text in lines if '\n' in text.strip()]
    for file, lines in texts.items():
        texts[file] = [' '.join(text.split()) for text in lines]
    if several:
        print(f'{source}: {len(several)} captions of several lines, each of which is one caption here (such as '
              f'{" ".join(several[0].split())[:60]!r}); give a row for each caption if they are several')


def is_absent(value):
    """Return whether the value of a cell is none, for which pandas has NaN."""
    return value in (None, '', *EMPTY) or value != value


def checked_class(name, where):
    """Return the name of a class. Raises UserError, which begins with `where`, if it cannot be one."""
    if isinstance(name, bool) or not isinstance(name, str | int | float):
        raise UserError(f'{where}: {shown(str(name))[:60]} cannot be the name of a class; write text or a number')
    name = normalized(str(name).strip())
    if not name or '/' in name or not is_plain(name) or len(name) > LONGEST_CLASS:
        raise UserError(f'{where}: {name[:60]!r} cannot be the name of a class; write up to {LONGEST_CLASS} '
                        'characters, without / and control characters')
    return name


def read_coco(pictures, paths, with_objects):
    """Return the `Captions` in COCO's captions_*.json files.

    The class of a picture is the object that covers most of it, if instances_*.json lies beside (`with_objects`).
    Pictures are found by name, in whatever subfolder they are.
    """
    advice = 'give a captions_*.json of COCO, with "images" and "annotations"'
    places = defaultdict(list)
    for picture in pictures:
        places[normalized(os.path.basename(picture.file))].append(picture.file)
    texts, classes, splits, origins, absent = defaultdict(list), {}, {}, {}, set()
    has_test = any(os.path.basename(path).startswith('captions_test') for path in paths)
    of_parts = WITH_TEST if has_test else COCO_SPLITS
    for path in paths:
        data = read_json(path, advice, JSON_BYTES['captions'])
        names, kind = _names_by_id(data, path, advice), os.path.basename(path)
        split = next((split for part, split in of_parts.items() if kind.startswith(f'captions_{part}')), None)
        files = _files_of(names, places, path)
        absent |= {name for number, name in names.items() if number not in files}
        for file in files.values():
            if split and splits.setdefault(file, split) != split:
                raise UserError(f'{path}: {file} has captions for both {splits[file]} and {split}; keep it in only one')
            if origins.setdefault(file, kind) != kind:
                raise UserError(f'{path}: has captions of {file}, and so does {origins[file]}; keep them in one file')
        unlisted = []
        for one in _records(data, 'annotations', path, advice):
            text = one.get('caption')
            if not isinstance(text, str):
                raise UserError(f'{path}: an annotation has no caption; {advice}')
            number = _id(one, 'image_id', path, advice)
            if number not in names:
                unlisted.append(number)
            if file := files.get(number):
                texts[file].append(text)
        if unlisted:
            print(f'not read: {len(unlisted)} captions of images that {path} does not list (such as image_id '
                  f'{unlisted[0]!r:.60})')
        objects = os.path.join(os.path.dirname(path), kind.replace('captions_', 'instances_', 1))
        if with_objects and objects != path and os.path.exists(objects):
            classes |= _largest_objects(objects, files)
    source = ', '.join(map(os.path.basename, paths))
    join_lines(texts, source)
    return Captions(source, lambda picture: partial(checked_captions, texts.get(picture.file, ())), classes, splits,
                    absent, is_coco=bool(splits))


def _files_of(names, places, path):
    """Return {id: file} for the images {id: name} of one of COCO's files that are among the pictures.

    `places` are {name of a picture: files that are called so, in whatever folders}. Raises UserError if it is not clear
    which one an image is, or if two are the same.
    """
    files = {}
    for number, name in names.items():
        found = places.get(name.rpartition('/')[2], [])
        if '/' in name:  # dogs/1.jpg is not cats/1.jpg, but any/dogs/1.jpg, or 1.jpg if that is in no folder
            found = ([file for file in found if normalized(f'/{file}').endswith(f'/{name}')]
                     or [file for file in found if f'/{name}'.endswith(normalized(f'/{file}'))])
        if len(found) > 1:
            raise UserError(f'{path}: {len(found)} pictures are called {shown(name)} ({found[0]} and {found[1]}); give '
                            '--images the folder of one of them')
        if found:
            files[number] = found[0]
    taken = {}
    for number, file in files.items():
        other = taken.setdefault(file, number)
        if other != number:
            raise UserError(f'{path}: {shown(names[other])} and {shown(names[number])} are both {file} among the '
                            'pictures; keep only one, or give --images a folder that has both')
    return files


def _largest_objects(path, files):
    """Return {file: name of the category whose objects cover the largest area} from one of COCO's instances_*.json."""
    advice = 'give an instances_*.json of COCO, with "annotations" and "categories", or use --classes own'
    data, area = read_json(path, advice, JSON_BYTES['instances']), defaultdict(Counter)
    names = {number: checked_class(one.get('name', ''), path)
             for number, one in _by_id(data, 'categories', path, advice).items()}
    for one in _records(data, 'annotations', path, advice):
        image, category = (_id(one, name, path, advice) for name in ('image_id', 'category_id'))
        covered = one.get('area')
        if category not in names or type(covered) not in (int, float) or not 0 <= covered <= LARGEST_AREA:
            raise UserError(f'{path}: an annotation has an unknown category or no area of 0 or more pixels; {advice}')
        if image in files:
            area[files[image]][names[category]] += covered
    return {file: max(sorted(found), key=found.get) for file, found in area.items()}


def _names_by_id(data, path, advice):
    names = {number: one.get('file_name') for number, one in _by_id(data, 'images', path, advice).items()}
    if not all(isinstance(name, str) and name for name in names.values()):
        raise UserError(f'{path}: an image has no file_name; {advice}')
    return {number: normalized(name.replace('\\', '/')) for number, name in names.items()}


def _by_id(data, name, path, advice):
    records = _records(data, name, path, advice)
    found = {_id(one, 'id', path, advice): one for one in records}
    if len(found) < len(records):
        raise UserError(f'{path}: two {name} have the same id, so annotations are ambiguous; {advice}')
    return found


def _records(data, name, path, advice):
    records = data.get(name) if isinstance(data, dict) else None
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise UserError(f'{path}: has no list of {name}; {advice}')
    return records


def _id(record, name, path, advice):
    value = record.get(name)
    if isinstance(value, float) and value.is_integer():  # pandas writes such ones
        value = int(value)
    if not isinstance(value, int | str):
        raise UserError(f'{path}: a record has no {name}, or one that is neither a whole number nor text; {advice}')
    return value
