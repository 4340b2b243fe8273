"""What a run shows people: tables, figures, and one page of both. Reads results, and needs no torch."""
