"""Published alternatives to a shallow student, reimplemented on the same teacher; one file each."""
