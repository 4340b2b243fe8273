"""One script for each rule. Signs that a terminal's encoding lacks are printed as escapes."""

import sys

for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors="backslashreplace")
