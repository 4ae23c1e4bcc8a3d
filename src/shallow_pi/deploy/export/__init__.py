"""Students in other projects' layouts: one file a format, found by name in `formats`."""
