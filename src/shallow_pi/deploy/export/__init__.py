"""Students in other projects' layouts and as graphs: one file per format, listed in `formats`."""
