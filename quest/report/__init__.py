"""Tables and figures of a run, and one page that shows both. This room reads result files and needs no torch."""
