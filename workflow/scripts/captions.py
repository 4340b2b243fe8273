"""COCO's captions_*.json to a text file with one caption per line: the first of each image, by image id."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", type=Path, help="captions_val2014.json")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    from quest.captions import coco
    from quest.files import atomic

    captions = coco(arguments.annotations)
    with atomic(arguments.output) as file:
        file.write_text("\n".join(captions) + "\n", encoding="utf-8")
    print(f"{len(captions)} captions in {arguments.output}")


if __name__ == "__main__":
    main()
