"""Each rule has a script here. Characters that the encoding of a terminal lacks are printed as escapes."""

import sys

for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors="backslashreplace")
