"""Where the files of this repository are. Included first, because the default config is one of them."""

import os
from pathlib import Path

import quest

# Where another workflow takes this one as a module, or with --directory, workflow/ and resources/ are not in the working
# directory. They are then those of the clone that `quest` was installed from, and results stay in the working directory.
CLONE = None if Path("workflow/rules/common.smk").is_file() else Path(quest.__file__).parents[1]


def project(path):
    """A path of this repository, from the working directory."""
    return str(CLONE / path) if CLONE else path


if CLONE:
    if not Path(project("workflow/rules/common.smk")).is_file():
        raise WorkflowError("the workflow needs a clone of this repository: `pip install -e CLONE` instead of a wheel")
    os.environ.update(QUEST_RESULTS=os.path.abspath("results"))
