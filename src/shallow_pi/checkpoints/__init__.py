"""openpi's layout on disk and a run's folder: the one owner of every file name in them."""
