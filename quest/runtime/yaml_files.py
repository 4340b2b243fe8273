"""Read YAML files that people wrote, and refuse with one clear line whatever YAML would misread or fail on later."""

import os

import yaml

from quest.runtime.files import one_line, read_text

VALUES = 100_000  # most values in a file, with aliases expanded


def read_yaml(file: str | os.PathLike):
    """The content of a YAML file.

    Raises ValueError that names the file if it is not YAML in UTF-8, contains a key twice or a key that is not text, or
    is too large or too deeply nested.
    """

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            lines: dict = {}
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
                if not isinstance(name, str):
                    raise Refused(f"{file}, line {line}: key {one_line(repr(name))} is not text; write it in quotes")
                if name in lines:  # YAML would silently use the last of the two
                    raise Refused(f"{file}, line {line}: key {name!r} stands twice, first in line {lines[name]}")
                lines[name] = line
            return super().construct_mapping(node, deep)

    text = read_text(file)
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > VALUES:
            raise Refused(f"{file}: its aliases stand for more than {VALUES} values")
        return None if node is None else loader.construct_document(node)
    except Refused:
        raise
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply, or an alias inside what it stands for") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # odd dates and numbers raise any of these
        raise ValueError(f"{file}: not YAML: {one_line(' '.join(str(error).split()))}") from None


class Refused(ValueError):
    """YAML allows this content, but this project does not."""


def _size(node, known: dict[int, int]) -> int:
    """Number of values in a YAML node with aliases expanded. Raises RecursionError if an alias contains itself."""
    if id(node) not in known:
        pairs = node.value if isinstance(node.value, list) else []
        inside = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else [pair])]
        known[id(node)] = 1 + sum(_size(part, known) for part in inside)
    return known[id(node)]
