"""Students in other projects' layouts and as graphs: one file a format, found in `formats`."""
