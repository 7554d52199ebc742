"""Find the captions of pictures as people have them: text files, metadata.csv or metadata.jsonl, COCO's JSON files.

Each function returns `Captions`. One that reads lists raises UserError, with the line, if a list is not what it should
be; a single text file that cannot be used does not stop the conversion.
"""
import csv
import io
import json
import os
from collections import Counter, defaultdict, namedtuple
from functools import partial

from common.errors import UserError
from data.bounded_files import files_in, is_plain, normalized, read_json, read_text, shown
from data.converting import checked_captions, read_captions

METADATA = ('metadata.csv', 'metadata.jsonl')
JSON_BYTES = {'captions': 256 << 20, 'instances': 1 << 30}  # COCO's largest have 92 MB and 470 MB
LONGEST_CLASS = 200  # characters
COCO_SPLITS = {'train': 'train', 'val': 'test'}  # of captions_train2014.json: the authors test on COCO's val
HOW = 'data/README.md says how captions can be given'

# Where captions are from; `of(picture)` returns the function that reads those of a picture; {file: class} and
# {file: split} of what is known about pictures beside; files that have captions, but are not pictures of the folder;
# the folder of NAME.txt, if captions are in such files.
Captions = namedtuple('Captions', 'source of classes splits absent folder', defaults=[None])


def find(pictures, given, folder, with_objects):
    """Return the `Captions` of pictures in `folder`, from the file or folder `given`.

    `with_objects` says whether COCO's instances_*.json in the same folder give the classes.
    """
    if os.path.isdir(given):
        files = list(filter(is_plain, files_in(given)))
        coco = [os.path.join(given, file) for file in files if file.startswith('captions_') and file.endswith('.json')]
        listed = [file for file in files if os.path.basename(file) in METADATA]
        if coco:
            return read_coco(pictures, coco, with_objects)
        if listed:
            return read_metadata(pictures, given, listed)
        return Captions(f'text files in {given}', lambda picture: partial(
            read_captions, os.path.join(given, f'{picture.key}.txt')), {}, {}, set(), given)
    if not os.path.exists(given):
        raise UserError(f'--captions {given}: no such file or folder; {HOW}')
    if given.endswith('.json'):
        return read_coco(pictures, [given], with_objects)
    if given.endswith(('.csv', '.jsonl')):
        return read_metadata(pictures, os.path.dirname(given) or '.', [os.path.basename(given)], folder)
    raise UserError(f'--captions {given}: is neither a folder nor a .csv, .jsonl or .json file; {HOW}')


def read_metadata(pictures, root, files, folder=None):
    """Return the `Captions` in metadata.csv or metadata.jsonl files, `files` in `root`.

    As Hugging Face's ImageFolder has it, `file_name` is the path of a picture from the file's folder, and `text` its
    caption; several lines of a picture are several captions. `class` may name its class. With `folder`, the folder of
    the pictures, paths from there are read as well.
    """
    known = {normalized(picture.file): picture.file for picture in pictures}
    texts, classes, absent = defaultdict(list), {}, set()
    for file in files:
        path, beside = os.path.join(root, file), os.path.dirname(file)
        for number, row in read_rows(path):
            name, text, class_name = (row.get(key) for key in ('file_name', 'text', 'class'))
            lines = text if isinstance(text, list) else [text]
            if not isinstance(name, str) or not name.strip() or not all(isinstance(line, str) for line in lines):
                raise UserError(f'{path}: line {number} has no file_name or no text; give both, in quotation marks if '
                                'they contain commas')
            name = normalized(_path(beside, name.strip().replace('\\', '/')))
            if folder and name not in known:  # the list lies elsewhere
                name = os.path.relpath(os.path.join(root, name), folder).replace(os.sep, '/')
            if name not in known:
                absent.add(name)
                continue
            name = known[name]
            texts[name] += [' '.join(line.split()) for line in lines]
            if class_name:
                classes[name] = checked_class(class_name, f'{path}: line {number}')
    source = ', '.join(files[:3]) + ', ...' * bool(files[3:])
    return Captions(source, lambda picture: partial(checked_captions, texts.get(picture.file, ())), classes, {}, absent)


def _path(*parts):
    return os.path.normpath(os.path.join(*parts)).replace(os.sep, '/')


def read_rows(path):
    """Yield (line number, {column: value}) for each row of a .csv or .jsonl file. Raises UserError if it is neither."""
    advice = 'give a file with file_name and text in each row'
    if path.endswith('.csv'):
        reader = csv.DictReader(io.StringIO(read_text(path, advice)))
        try:
            missing = [name for name in ('file_name', 'text') if name not in (reader.fieldnames or ())]
            if missing:
                found = shown(', '.join(map(str, reader.fieldnames or ['nothing'])))[:100]
                raise UserError(f'{path}: its first line has no column {" and no column ".join(missing)} (it has '
                                f'{found}); {advice}')
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise UserError(f'{path}: line {reader.line_num} is not CSV ({error}); {advice}') from error
        return
    for number, line in enumerate(read_text(path, advice).split('\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}: line {number} is not a JSON object; {advice}') from error
        if not isinstance(row, dict):
            raise UserError(f'{path}: line {number} is not a JSON object; {advice}')
        yield number, row


def checked_class(name, where):
    """Return the name of a class. Raises UserError, which begins with `where`, if it cannot be one."""
    name = normalized(str(name).strip())
    if not name or '/' in name or not is_plain(name) or len(name) > LONGEST_CLASS:
        raise UserError(f'{where}: {name[:60]!r} cannot be the name of a class; write up to {LONGEST_CLASS} '
                        'characters, without / and control characters')
    return name


def read_coco(pictures, paths, with_objects):
    """Return the `Captions` in COCO's captions_*.json files.

    The class of a picture is the object that covers most of it, if instances_*.json lies beside (`with_objects`).
    Pictures are found by name, in whatever sub-folder they are.
    """
    advice = 'give a captions_*.json of COCO, with "images" and "annotations"'
    places = defaultdict(list)
    for picture in pictures:
        places[os.path.basename(picture.file)].append(picture.file)
    texts, classes, splits, absent = defaultdict(list), {}, {}, set()
    for path in paths:
        data = read_json(path, advice, JSON_BYTES['captions'])
        names, kind = _names_by_id(data, path, advice), os.path.basename(path)
        split = next((split for part, split in COCO_SPLITS.items() if kind.startswith(f'captions_{part}')), None)
        files = {}
        for number, name in names.items():
            found = places.get(name.rpartition('/')[2], ())
            if len(found) > 1:
                raise UserError(f'{path}: {len(found)} pictures are called {shown(name)} ({found[0]} and '
                                f'{found[1]}); give --images the folder of one of them')
            if found:
                files[number] = found[0]
                splits |= {found[0]: split} if split else {}
            else:
                absent.add(name)
        for one in _records(data, 'annotations', path, advice):
            text = one.get('caption')
            if not isinstance(text, str):
                raise UserError(f'{path}: an annotation has no caption; {advice}')
            if file := files.get(_id(one, 'image_id', path, advice)):
                texts[file].append(' '.join(text.split()))
        objects = os.path.join(os.path.dirname(path), kind.replace('captions_', 'instances_', 1))
        if with_objects and objects != path and os.path.exists(objects):
            classes |= _largest_objects(objects, files)
    source = ', '.join(map(os.path.basename, paths))
    return Captions(source, lambda picture: partial(checked_captions, texts.get(picture.file, ())), classes, splits,
                    absent)


def _largest_objects(path, files):
    """Return {file: name of the category whose objects cover the largest area} from one of COCO's instances_*.json."""
    advice = 'give an instances_*.json of COCO, with "annotations" and "categories", or use --classes own'
    data, area = read_json(path, advice, JSON_BYTES['instances']), defaultdict(Counter)
    names = {_id(one, 'id', path, advice): checked_class(one.get('name', ''), path)
             for one in _records(data, 'categories', path, advice)}
    for one in _records(data, 'annotations', path, advice):
        image, category = (_id(one, name, path, advice) for name in ('image_id', 'category_id'))
        if category not in names or not isinstance(one.get('area', 0), int | float):
            raise UserError(f'{path}: an annotation has an unknown category or no area; {advice}')
        if image in files:
            area[files[image]][names[category]] += one.get('area', 0)
    return {file: max(sorted(found), key=found.get) for file, found in area.items()}


def _names_by_id(data, path, advice):
    images = _records(data, 'images', path, advice)
    names = {_id(one, 'id', path, advice): one.get('file_name') for one in images}
    if not all(isinstance(name, str) and name for name in names.values()):
        raise UserError(f'{path}: an image has no file_name; {advice}')
    if len(names) < len(images):
        raise UserError(f'{path}: two images have the same id, so captions are ambiguous; {advice}')
    return names


def _records(data, name, path, advice):
    records = data.get(name) if isinstance(data, dict) else None
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise UserError(f'{path}: has no list of {name}; {advice}')
    return records


def _id(record, name, path, advice):
    value = record.get(name)
    if not isinstance(value, int | str):
        raise UserError(f'{path}: a record has no {name}, or one that is neither a whole number nor text; {advice}')
    return value
